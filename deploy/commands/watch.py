"""``tiercel watch``: what a running gateway knows of its quantized agents, and a person's word to it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from deploy.commands import add_json, file_to_write, print_json, run_engines, say
from deploy.commands.asking import GatewayClient, add_asking, client, door
from gateway.config import ConfigError, load_config, variant_id
from gateway.quality.judge import JudgeError, read, request
from quantize.core.jsonl import read_lines

COMMANDS = ("show", "report", "judge", "score", "demote", "restore", "pin", "unpin", "-h", "--help")
PATH = "/admin/watch"


def add_watch(parser: argparse.ArgumentParser) -> None:
    """The commands of ``tiercel watch``; ``show`` is the one when none is named."""
    commands = parser.add_subparsers(required=True, metavar="command")
    showing = add_asking(commands, "show", show, "every variant in every role: its checks, and what happened")
    add_json(showing)
    showing.add_argument("--hours", type=float, default=1.0, help="for the sums over time in the JSON")
    writing = add_asking(commands, "report", report, "write one HTML file with charts over time")
    writing.add_argument("--out", type=file_to_write, default=Path("var/watch.html"))
    writing.add_argument("--hours", type=float, default=24.0)
    texts = {
        "demote": "take a variant out of a role's choice; probation may bring it back",
        "restore": "put it back",
        "pin": "keep it in a role's choice, or with --out of it, whatever the checks say",
        "unpin": "let the checks decide again",
    }
    for name, text in texts.items():
        acting = add_asking(commands, name, act, text)
        acting.add_argument("variant", help="model:variant, or its name where one model alone serves such")
        acting.add_argument("role")
        acting.add_argument("--why", default="by hand", help="for whoever reads the events")
        acting.set_defaults(action=name, out_of=False)
        if name == "pin":
            acting.add_argument("--out", dest="out_of", action="store_true", help="keep it out")

    text = "have the reference score the answers that wait for it (watch.reference: batch)"
    add_json(add_asking(commands, "score", score, text))

    judging = add_asking(
        commands, "judge", judge, "measure how often the judge is wrong, on labelled answers"
    )
    judging.add_argument(
        "labelled", type=Path, help='JSON Lines: {"context": …, "answer": …, "supported": true or false}'
    )


def with_show(arguments: list[str]) -> list[str]:
    """``tiercel watch`` is short for ``tiercel watch show``."""
    if arguments[:1] == ["watch"] and (len(arguments) == 1 or arguments[1] not in COMMANDS):
        arguments.insert(1, "show")
    return arguments


def show(options: argparse.Namespace) -> None:
    from deploy.watch_page import format_watch

    found = client(options).ask(f"{PATH}?since_s={3600 * options.hours}")
    if options.json:
        print_json(found)
    else:
        print(format_watch(found))


def report(options: argparse.Namespace) -> None:
    from deploy.watch_page import render_watch
    from quantize.core.files import write_whole

    found = client(options).ask(f"{PATH}?since_s={3600 * options.hours}&events=1000")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, render_watch(found))
    say(f"written to {options.out}")


def act(options: argparse.Namespace) -> None:
    action = options.action
    if action == "pin":
        action = "pin_demoted" if options.out_of else "pin_serving"
    gateway = client(options)
    variant = _whole_name(options.variant, gateway)
    order = {"action": action, "variant": variant, "role": options.role, "why": options.why}
    event = gateway.ask(PATH, order)
    say(f"{event['variant']} as {event['role']}: {event['kind']}: {event['why']}")


def _whole_name(variant: str, gateway: GatewayClient) -> str:
    """``model:variant``, of a variant alone that one model alone serves. Raises ConfigError."""
    if ":" in variant:
        return variant
    models = gateway.ask("/admin/config")["models"]
    found = [variant_id(name, variant) for name, model in models.items() if variant in model["serve"]]
    if len(found) > 1:
        raise ConfigError(f"{variant}: several models serve such a variant; write one of: {', '.join(found)}")
    return found[0] if found else variant  # which the gateway refuses, with those that it knows


def score(options: argparse.Namespace) -> None:
    from deploy import scoring

    config = load_config(options.config)
    found = run_engines(scoring.score(config, door(options, config), say))
    if options.json:
        print_json(
            {
                "answers": [
                    {"variant": variant, "role": role, **asdict(one)}
                    for (variant, role), one in found.tallies.items()
                ],
                "replaced": found.replaced,
                "damaged": found.damaged,
            }
        )
        return
    for sentence in found.told():
        print(sentence)
    if not (found.tallies or found.replaced or found.damaged):
        say("no answer waits for the reference")


def judge(options: argparse.Namespace) -> None:
    """Ask the judge about every labelled answer, and tell the gateway what came of it."""
    settings = load_config(options.config).watch.judge
    if settings is None:
        raise ConfigError(f"{options.config}: watch.judge is not set; name the model that judges")
    labelled, gateway = read_labelled(options.labelled), client(options)
    right, unreadable = {True: 0, False: 0}, 0
    for one in tqdm(labelled, desc="judge", unit="answer", mininterval=1):
        asked = request(one.answer, one.context, settings.max_tokens)
        if asked is None:
            continue
        body, sentences = asked
        reply = gateway.ask("/v1/chat/completions", {**body, "model": settings.model})
        try:
            right[one.supported] += (read(reply, sentences).bad == 0) is one.supported
        except JudgeError:
            unreadable += 1  # it has found nothing out about this one, which counts as wrong
    count = {kind: sum(one.supported is kind for one in labelled) for kind in (True, False)}
    errors: dict[str, Any] = {
        "model": settings.model,
        "sensitivity": right[False] / count[False],
        "specificity": right[True] / count[True],
        "bad": count[False],
        "good": count[True],
    }
    gateway.ask(f"{PATH}/judge", errors)
    say(
        f"{settings.model} calls {right[False]} of {count[False]} bad answers bad and {right[True]} of "
        f"{count[True]} good ones good; {unreadable} of its answers could not be read"
    )
    if errors["sensitivity"] + errors["specificity"] <= 1:
        say("that is no better than chance: what it finds says nothing")


class Labelled(BaseModel):
    """A known answer."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    context: str
    answer: str
    supported: bool


def read_labelled(path: Path) -> list[Labelled]:
    """Raises ConfigError for a file that cannot be used, with the line and the fix."""
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    found = []
    for number, line in lines:
        try:
            found.append(Labelled.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the line"
            raise ConfigError(f"{path}:{number}: {where}: {first['msg']}") from None
    if len({one.supported for one in found}) < 2:
        raise ConfigError(f"{path}: needs answers that are supported, and others that are not")
    return found
