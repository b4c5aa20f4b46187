"""Runs a recipe's code, section by section, as somebody would who copies it: in the framework's environment.

``python recipe.py PAGE URL``. Reads the names of sections from standard input, a line each, and writes what
came of each, a line of JSON each. Needs nothing but Python. What the code itself prints goes to standard
error. Connections that leave this machine are refused and told.
"""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import inspect
import ipaddress
import json
import linecache
import os
import re
import sys
import traceback
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHOWN_URL = "http://127.0.0.1:8080"
TOLD = ("text", "pieces", "usage", "found", "variants", "calls", "score")
"""Names that a section may leave behind, each with what it found out."""
_INPUT = ("prompt_tokens", "input_tokens", "prompt_token_count", "input_token_count")
_OUTPUT = ("completion_tokens", "output_tokens", "candidates_token_count", "output_token_count")
outside: list[str] = []


def sections(page: str) -> dict[str, str]:
    """The code of a page, by heading."""
    parts = re.split(r"^## (.+)$", page, flags=re.MULTILINE)
    code = {
        heading.strip(): "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
        for heading, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {heading: block for heading, block in code.items() if block}


def guard(event: str, given: tuple[Any, ...]) -> None:
    """Nothing here has to leave this machine."""
    if event != "socket.connect" or not isinstance(given[1], tuple):
        return
    try:
        stays = ipaddress.ip_address(given[1][0]).is_loopback
    except ValueError:
        stays = given[1][0] == "localhost"
    if not stays:
        outside.append(f"{given[1][0]}:{given[1][1]}")
        raise ConnectionRefusedError(f"{given[1][0]}: the recipes stay on this machine")


async def run(heading: str, code: str, names: dict[str, Any]) -> dict[str, Any]:
    """What the code of a section left behind under the names in ``TOLD``."""
    for name in TOLD:
        names.pop(name, None)
    file = f"<{heading}>"
    # Some frameworks read the source of the functions that they are given.
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    compiled = compile(code, file, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if compiled.co_flags & inspect.CO_COROUTINE:
        await eval(compiled, names)
    else:
        await asyncio.to_thread(exec, compiled, names)
    told = {name: plain(names[name]) for name in TOLD if name in names}
    if "usage" in told:
        told["usage"] = [first(told["usage"], _INPUT), first(told["usage"], _OUTPUT)]
    return told


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(one) for one in value]
    if hasattr(value, "model_dump"):
        return plain(value.model_dump())
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {name: plain(one) for name, one in vars(value).items() if not name.startswith("_")}


def first(usage: Any, names: tuple[str, ...]) -> int | None:
    """The count under one of the names, however deep."""
    if isinstance(usage, dict):
        for name in names:
            if isinstance(usage.get(name), int):
                return int(usage[name])
        found = (first(one, names) for one in usage.values())
        return next((one for one in found if one is not None), None)
    return None


async def main(code: dict[str, str]) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.addaudithook(guard)
    # A module of its own: annotations are looked up in the module that a class says it is of.
    module = sys.modules["recipe"] = types.ModuleType("recipe")
    names: dict[str, Any] = vars(module)
    # The loop goes on between sections, as an application's does.
    while heading := (await asyncio.to_thread(sys.stdin.readline)).strip():
        try:
            told = await run(heading, code[heading], names)
        except BaseException:
            told = {"error": traceback.format_exc()}
        answers.write(json.dumps({**told, "outside": outside}) + "\n")
        answers.flush()
        outside.clear()


if __name__ == "__main__":
    shown = Path(sys.argv[1]).read_text(encoding="utf-8")
    asyncio.run(main(sections(shown.replace(SHOWN_URL, sys.argv[2]))))
