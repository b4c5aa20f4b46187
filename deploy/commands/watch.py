"""``tiercel watch``: what a running gateway knows of its quantized agents, and a person's word to it."""

from __future__ import annotations

import argparse
import json
import os
import ssl
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from deploy.commands import add_command, say
from gateway.config import Config, load_config
from gateway.errors import GatewayError

KEY = "TIERCEL_KEY"
COMMANDS = ("show", "report", "demote", "restore", "pin", "unpin", "-h", "--help")
TIMEOUT_S = 15.0


def add_watch(parser: argparse.ArgumentParser) -> None:
    """The commands of ``tiercel watch``; ``show`` is the one when none is named."""
    commands = parser.add_subparsers(required=True, metavar="command")
    showing = _add(commands, "show", show, "every variant in every role: its checks, and what happened")
    showing.add_argument("--json", action="store_true", help="machine-readable")
    showing.add_argument("--hours", type=float, default=1.0, help="for the sums over time in the JSON")
    writing = _add(commands, "report", report, "write one HTML file with charts over time")
    writing.add_argument("--out", type=Path, default=Path("var/watch.html"))
    writing.add_argument("--hours", type=float, default=24.0)
    texts = {
        "demote": "take a variant out of a role's choice; probation may bring it back",
        "restore": "put it back",
        "pin": "keep it in a role's choice, or with --out of it, whatever the checks say",
        "unpin": "let the checks decide again",
    }
    for name, text in texts.items():
        acting = _add(commands, name, act, text)
        acting.add_argument("variant")
        acting.add_argument("role")
        acting.add_argument("--why", default="by hand", help="for whoever reads the events")
        acting.set_defaults(action=name, out_of=False)
        if name == "pin":
            acting.add_argument("--out", dest="out_of", action="store_true", help="keep it out")


def _add(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command = add_command(commands, name, run, text)
    command.add_argument("--url", help="the gateway (default: where the YAML file says that it listens)")
    command.add_argument("--key", help=f"an admin's key (default: the environment variable {KEY})")
    return command


def with_show(arguments: list[str]) -> list[str]:
    """``tiercel watch`` is short for ``tiercel watch show``."""
    if arguments[:1] == ["watch"] and (len(arguments) == 1 or arguments[1] not in COMMANDS):
        arguments.insert(1, "show")
    return arguments


def show(options: argparse.Namespace) -> None:
    from deploy.watch_page import format_watch

    found = _ask(options, f"?since_s={3600 * options.hours}")
    print(json.dumps(found, indent=1) if options.json else format_watch(found))


def report(options: argparse.Namespace) -> None:
    from deploy.watch_page import render_watch
    from quantize.files import write_whole

    found = _ask(options, f"?since_s={3600 * options.hours}&events=1000")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, render_watch(found))
    say(f"written to {options.out}")


def act(options: argparse.Namespace) -> None:
    action = options.action
    if action == "pin":
        action = "pin_demoted" if options.out_of else "pin_serving"
    order = {"action": action, "variant": options.variant, "role": options.role, "why": options.why}
    event = _ask(options, "", order)
    say(f"{event['variant']} as {event['role']}: {event['kind']}: {event['why']}")


def _ask(options: argparse.Namespace, query: str, order: dict[str, str] | None = None) -> dict[str, Any]:
    """The gateway's answer. Raises GatewayError with its words, or with what to do when it does not
    answer."""
    config = load_config(options.config)
    base = (options.url or _address(config)).rstrip("/")
    headers = {"content-type": "application/json"}
    if key := options.key or os.environ.get(KEY):
        headers["authorization"] = f"Bearer {key}"
    data = None if order is None else json.dumps(order).encode()
    request = Request(base + "/admin/watch" + query, data, headers)
    unchecked = ssl.create_default_context()
    if options.url is None:  # the certificate is of the name that clients use, not of this machine
        unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    try:
        with urlopen(request, timeout=TIMEOUT_S, context=unchecked) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except HTTPError as error:
        try:
            words = json.load(error)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            words = f"{base} answered {error.code}"
        hint = f"; give an admin's key with --key or {KEY}" if error.code in (401, 403) else ""
        raise GatewayError(words + hint) from None
    except (URLError, TimeoutError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise GatewayError(f"{base} does not answer ({reason}); start it with `tiercel up`") from None


def _address(config: Config) -> str:
    gateway = config.gateway
    scheme = "https" if gateway.tls_certificate else "http"
    host = "127.0.0.1" if gateway.host in ("0.0.0.0", "::") else gateway.host
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{gateway.port}"
