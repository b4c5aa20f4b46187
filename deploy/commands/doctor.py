"""``tiercel doctor``: looks at the machine and the installation, and says what to do. It changes nothing."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from deploy.commands import NOT_WELL, add_command, add_json, print_json
from deploy.commands.findings import Check, Finding, Findings, Level, Subject, failure, ok, warning
from gateway.config import ConfigError, load_config


def add_doctor(commands: Any) -> None:
    text = "look at the machine and the installation, and say what to do; changes nothing"
    add_json(add_command(commands, "doctor", doctor, text))


def doctor(options: argparse.Namespace) -> None:
    """Exit status 1 when something cannot work as it is; warnings alone are status 0."""
    found = list(examine(options.config))
    count = {level: sum(one.level is level for one in found) for level in Level}
    healthy = not count[Level.FAILURE]
    if options.json:
        print_json(
            {
                "well": healthy,
                "failures": count[Level.FAILURE],
                "warnings": count[Level.WARNING],
                "findings": [dataclasses.asdict(one) for one in found],
            }
        )
    else:
        print(format_findings(found))
        print(f"\nfailures: {count[Level.FAILURE]}, warnings: {count[Level.WARNING]}, ok: {count[Level.OK]}")
    if not healthy:
        sys.exit(NOT_WELL)


def examine(path: Path) -> Iterator[Finding]:
    """Every check, one after the other. Checks that need the configuration wait for one that is valid."""
    from deploy.commands import check_machine as machine
    from deploy.commands import check_running as running
    from deploy.commands import check_serving as serving

    for name, always in {
        "python": machine.check_python,
        "product": machine.check_product,
        "open files": machine.check_open_files,
    }.items():
        yield from _run(name, always)
    checks: dict[str, Check] = {
        "engine": machine.check_engine,
        "processor": machine.check_processor,
        "memory": machine.check_memory,
        "disk": machine.check_disk,
        "/dev/shm": machine.check_shm,
        "files": serving.check_files,
        "variants": serving.check_variants,
        "permissions": serving.check_permissions,
        "store": serving.check_store,
        "ports": running.check_ports,
        "engines": running.check_engines,
        "leftovers": running.check_leftovers,
    }
    try:
        subject = Subject(path, load_config(path))
    except ConfigError as error:
        yield _named("configuration", failure(str(error), f"correct {path}"))
        yield _named(
            "configuration", warning(f"not looked at without it: {', '.join(checks)}", "tiercel doctor")
        )
        return
    yield _named("configuration", ok(f"{path} is valid"))
    for name, check in checks.items():
        yield from _run(name, partial(check, subject))


def _run(name: str, check: Callable[[], Findings]) -> Findings:
    """What a check finds. One that fails says so, and the others go on."""
    try:
        for found in check():
            yield _named(name, found)
    except Exception as error:
        words = f"could not be looked at: {type(error).__name__}: {error}"
        yield _named(name, warning(words, "look at it by hand"))


def _named(name: str, found: Finding) -> Finding:
    return dataclasses.replace(found, check=name)


def format_findings(found: list[Finding]) -> str:
    """A line each, and the fix below those that need one."""
    width = max(len(one.check) for one in found)
    lines = []
    for one in found:
        lines.append(f"{one.level.value:7}  {one.check:{width}}  {one.found}")
        if one.level is not Level.OK and one.fix:
            lines.append(f"{'':7}  {'':{width}}  → {one.fix}")
    return "\n".join(lines)
