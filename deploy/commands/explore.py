"""``tiercel quantize explore``: what precision does to a model, looked at from inside."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deploy.assistant
from deploy.commands import add_json, file_to_write, print_json, say
from gateway.config import ConfigError, load_config
from quantize.core.checkpoint import open_checkpoint
from quantize.evaluate.tasks import Item, read_items
from quantize.explore.found import WHATS

BITS = "8,6,4,3,2,1"
ITEMS = 32
OURS = b'{"key":'
"""How a file of finished points begins."""
SHIPPED = Path(deploy.assistant.__file__).parent / "data"
SHIPPED_ROLES = ("summarizer", "core")


def add_explore(commands: Any) -> None:
    text = "what bits do to a model, from inside: one HTML page; simulated, accepts nothing"
    exploring = commands.add_parser("explore", help=text, description=text)
    exploring.add_argument("model", type=Path, help="a checkpoint directory")
    exploring.add_argument("--config", type=Path, help="the YAML file whose roles are asked")
    exploring.add_argument("--out", type=file_to_write, help="the page (default: var/explore/NAME.html)")
    exploring.add_argument("--bits", default=BITS, help=f"of weights, inputs and KV cache (default: {BITS})")
    exploring.add_argument(
        "--roles",
        nargs="+",
        help="whose items are answered (default: those with grounds; without a configuration the demo's "
        f"{' and '.join(SHIPPED_ROLES)})",
    )
    exploring.add_argument(
        "--items", type=int, default=ITEMS, help=f"of each role, at every point (default: {ITEMS})"
    )
    exploring.add_argument(
        "--of", nargs="+", choices=WHATS, default=WHATS, help="what is rounded (default: each alone)"
    )
    exploring.add_argument("--tokens", type=int, help="of an answer at most (default: as the items say)")
    add_json(exploring)
    exploring.set_defaults(run=explore)


def explore(options: argparse.Namespace) -> None:
    bits = parsed_bits(options.bits)
    if options.items < 1:
        raise ConfigError(f"--items: {options.items} answers show nothing; give 1 or more")
    if options.tokens is not None and options.tokens < 1:
        raise ConfigError(f"--tokens: an answer of {options.tokens} tokens is none; give 1 or more")
    from quantize.check import refuse_unfit
    from quantize.explore.run import Wanted
    from quantize.explore.run import explore as run
    from quantize.report.explored import write_exploration

    if options.out is not None:
        refuse_other_file(options.out)
    checkpoint = open_checkpoint(options.model)
    refuse_unfit(checkpoint)
    roles = {role: _shortened(items, options) for role, items in items_of(options).items()}
    out = options.out or Path("var/explore") / f"{checkpoint.path.resolve().name}.html"
    found = run(checkpoint, Wanted(bits, roles, out.with_suffix(".jsonl"), tuple(options.of)))
    write_exploration(found, out)
    if options.json:
        print_json(found)
    say(f"written to {out}, and what it is made of to {out.with_suffix('.jsonl')}, which a second run reads")


def refuse_other_file(page: Path) -> None:
    """Raise ConfigError where what is written beside a page would go into another file, or into the page."""
    beside = page.with_suffix(".jsonl")
    if beside == page:
        raise ConfigError(f"--out: {page}: a page is made of such a file; name the page, {page.stem}.html")
    if beside.is_file():
        with beside.open("rb") as file:
            begins = file.read(len(OURS))
        if not OURS.startswith(begins):
            raise ConfigError(
                f"--out: {beside}, to which finished points are written, is there and holds something else; "
                "give the page another name"
            )


def parsed_bits(text: str) -> tuple[int, ...]:
    """Falling, each once. Raises ConfigError."""
    try:
        found = {int(one) for one in text.split(",")}
    except ValueError:
        raise ConfigError(f"--bits: {text!r} is not a list of numbers such as {BITS}") from None
    if bad := sorted(one for one in found if not 1 <= one <= 8):
        raise ConfigError(f"--bits: {bad[0]} is not between 1 and 8; leave it out")
    return tuple(sorted(found, reverse=True))


def items_of(options: argparse.Namespace) -> dict[str, Sequence[Item]]:
    """Items by role: of a configuration where there is one, else what ships. Raises ConfigError."""
    path = options.config or (Path("tiercel.yaml") if Path("tiercel.yaml").is_file() else None)
    if path is None:
        files = {role: SHIPPED / f"{role}.jsonl" for role in SHIPPED_ROLES}
    else:
        config = load_config(path)
        files = {name: role.tasks for name, role in config.roles.items() if role.tasks is not None}
    if unknown := [role for role in options.roles or () if role not in files]:
        known = ", ".join(files) or "none"
        raise ConfigError(f"--roles: {unknown[0]!r} is no role with tasks; known: {known}")
    read = {role: read_items(file, role) for role, file in files.items()}
    if options.roles:
        return {role: read[role] for role in options.roles}
    return dict(_distinct({role: items for role, items in read.items() if _grounded(items)}))


def _shortened(items: Sequence[Item], options: argparse.Namespace) -> list[Item]:
    """As many items as are wanted, with answers as long as they may be."""
    found = list(items[: options.items])
    if options.tokens is None:
        return found
    return [item.model_copy(update={"max_tokens": min(item.max_tokens, options.tokens)}) for item in found]


def _grounded(items: Sequence[Item]) -> bool:
    return all(item.grounds is not None for item in items)


def _distinct(roles: dict[str, list[Item]]) -> list[tuple[str, list[Item]]]:
    """Of roles with the same items the first: nobody learns anything from asking twice."""
    found: list[tuple[str, list[Item]]] = []
    for role, items in roles.items():
        if all(items != others for _, others in found):
            found.append((role, items))
    return found
