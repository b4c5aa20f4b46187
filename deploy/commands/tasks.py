"""``tiercel tasks``: what is kept of live traffic, and items made of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from deploy.commands import add_command, add_json, file_to_write, print_json, run_engines, say
from deploy.commands.asking import add_asking, door
from gateway.config import Config, ConfigError, load_config
from quantize.report.tables import align

COMMANDS = ("show", "record", "forget", "-h", "--help")


def add_tasks(commands: Any) -> None:
    """``tiercel tasks`` alone shows; see :func:`with_tasks`."""
    text = "what is kept of live traffic by consent, and items for gates made of it"
    kinds = commands.add_parser("tasks", help=text, description=text).add_subparsers(
        required=True, metavar="command"
    )
    add_json(add_command(kinds, "show", show, "how many conversations are kept, since when, of whom"))
    text = "write a role's kept conversations as items, answered by the reference"
    recording = add_asking(kinds, "record", record, text)
    recording.add_argument("role")
    recording.add_argument(
        "--out", type=file_to_write, required=True, help="the file of items (JSON Lines) to write"
    )
    recording.add_argument("--most", type=int, help="the newest so many (default: all)")
    forgetting = add_command(kinds, "forget", forget, "delete what is kept of a role, or with --all of all")
    forgetting.add_argument("role", nargs="?")
    forgetting.add_argument("--all", action="store_true", help="of all roles, answers that wait among them")


def with_tasks(arguments: Sequence[str]) -> list[str]:
    """``tiercel tasks`` is short for ``tiercel tasks show``."""
    given = list(arguments)
    if given[:1] == ["tasks"] and (len(given) == 1 or given[1] not in COMMANDS):
        given.insert(1, "show")
    return given


def show(options: argparse.Namespace) -> None:
    from deploy.recording import open_kept

    store = open_kept(load_config(options.config), sealed=True)
    try:
        counts = store.counts()
    finally:
        store.close()
    if options.json:
        names = ("kind", "role", "variant", "version", "number", "bytes", "since", "until")
        print_json([{name: getattr(one, name) for name in names} for one in counts])
        return
    if not counts:
        say("nothing is kept")
        return
    rows = [["role", "what", "variant", "number", "bytes", "since", "until"]]
    for one in counts:
        what = "for tasks" if one.kind == "request" else f"waits for the reference ({one.version})"
        when = [f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M}" for at in (one.since, one.until)]
        rows.append([one.role, what, one.variant, f"{one.number:,}", f"{one.bytes:,}", *when])
    print(align(rows))


def record(options: argparse.Namespace) -> None:
    from deploy import recording

    config = load_config(options.config)
    _refuse_unknown(config, options.role)
    if options.most is not None and options.most < 1:
        raise ConfigError(f"--most: {options.most} is no number of conversations; give 1 or more")
    work = recording.record(config, options.role, options.most, door(options, config), say)
    recorded = run_engines(work)
    for why, number in recorded.skipped.items():
        say(f"{number} conversations were left out: they {why}")
    if not recorded.items:
        raise ConfigError(f"{options.role}: no conversation is left that could become an item")
    recording.write_items(options.out, recorded.items)
    say(
        f"{len(recorded.items)} items are in {options.out}, each with the reference's own answer; set "
        f"roles.{options.role}.tasks to it. Where you know the right answer, change expected, and check to "
        "exact: then right answers count"
    )


def forget(options: argparse.Namespace) -> None:
    from deploy.recording import open_kept

    if options.all is (options.role is not None):
        raise ConfigError("give the role whose conversations are to be deleted, or --all")
    store = open_kept(load_config(options.config), sealed=True)
    try:
        gone = store.forget(options.role)
    finally:
        store.close()
    say(f"{gone} conversations were deleted")


def _refuse_unknown(config: Config, role: str) -> None:
    if role not in config.roles:
        raise ConfigError(f"{role!r} is not a role; known: {', '.join(sorted(config.roles))}")
