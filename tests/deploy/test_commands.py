"""docs/commands.md against the parser, JSON of the listing commands, and completion in a real shell."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.cli import main, parser
from deploy.commands import print_json
from deploy.commands.completion import SHELLS
from quantize.card import TextEvaluation

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gateway"))

from gateway_stack import settings, write_variants

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
LISTING = {
    "quantize check",
    "quantize measure",
    "quantize sensitivity",
    "quantize explore",
    "variants list",
    "variants show",
    "variants compare",
    "route",
    "advise",
    "watch show",
    "status",
    "doctor",
    "fleet show",
    "fleet plan",
}


def commands(
    above: argparse.ArgumentParser, words: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that can be run, with its words."""
    below = [action for action in above._actions if isinstance(action, argparse._SubParsersAction)]
    for action in below:
        for name, command in action.choices.items():
            yield from commands(command, f"{words} {name}".strip())
    if not below:
        yield words, above


def options(command: argparse.ArgumentParser) -> set[str]:
    return {option for action in command._actions for option in action.option_strings}


def table() -> str:
    """What the page must say of every command."""
    lines = ["| command | what it does | `--json` |", "|---|---|---|"]
    for words, command in commands(parser()):
        positional = [action for action in command._actions if not action.option_strings]
        shown = {"*": "[{}…]", "+": "{}…", "?": "[{}]", None: "{}"}
        names = [shown[a.nargs].format(a.dest.upper()) for a in positional if isinstance(a.nargs, str | None)]
        usage = " ".join(["tiercel", words, *names])
        lines.append(
            f"| `{usage}` | {command.description} | {'yes' if '--json' in options(command) else ''} |"
        )
    return "\n".join(lines)


def test_the_page_has_every_command() -> None:
    found = re.search(r"\| command \|.*?\n\n", PAGE, flags=re.DOTALL)
    assert found is not None
    assert found[0].strip() == table(), f"the table of docs/commands.md must be:\n{table()}"


def test_the_page_names_only_options_that_exist() -> None:
    known = {option for _, command in commands(parser()) for option in options(command)} | options(parser())
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE))
    assert named
    assert named <= known


def test_listing_commands_give_json() -> None:
    with_json = {words for words, command in commands(parser()) if "--json" in options(command)}
    assert with_json >= LISTING


@pytest.fixture
def config(tmp_path: Path) -> list[str]:
    write_variants(tmp_path / "variants")
    path = tmp_path / "tiercel.yaml"
    path.write_text(settings(tmp_path / "variants", {}))
    return ["--config", str(path)]


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["variants", "--json"], "bf16"),
        (["variants", "list", "--json"], "bf16"),
        (["variants", "show", "int8", "--json"], "int8"),
        (["variants", "compare", "int8", "bf16", "--json"], "int8"),
        (["route", "--role", "summarizer", "--json"], "summarizer"),
    ],
)
def test_standard_output_is_one_document(
    config: list[str], capsys: pytest.CaptureFixture[str], words: list[str], first: str
) -> None:
    main([*words, *config])
    found = json.loads(capsys.readouterr().out)
    one = found[0] if isinstance(found, list) else found
    assert first in (one.get("variant"), one.get("role"))


def test_what_is_infinite_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON has no such number: of a KL without a bound no browser and no jq could read the document."""
    unbounded = TextEvaluation.model_construct(kl_upper=math.inf, kl_mean=0.5)
    print_json({"cards": [unbounded], "took": (math.nan, -math.inf, 1.5, "Infinity")})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["took"] == [None, None, 1.5, "Infinity"]
    assert (found["cards"][0]["kl_upper"], found["cards"][0]["kl_mean"]) == (None, 0.5)


def test_what_was_made_is_one_document_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiercel.yaml"
    models = {"assistant": {"path": str(ROOT / "deploy/assistant/model"), "serve": ["bf16"]}}
    path.write_text(settings(tmp_path / "variants", {}, models=models))
    main(["quantize", "bf16", "--no-evaluate", "--json", "--config", str(path)])
    (made,) = json.loads(capsys.readouterr().out)
    main(["variants", "show", "bf16", "--json", "--config", str(path)])
    shown = json.loads(capsys.readouterr().out)
    assert re.fullmatch("[0-9a-f]{12}", made["version"])
    assert shown == made | {"all_versions": [made["version"]], "stale": []}


def test_exit_statuses(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As the page has them; 3 is in test_errors.py, 130 in test_supervisor.py, `status` in test_status.py."""
    assert [row[0] for row in re.findall(r"^\| (\d+) \| (.+) \|$", PAGE, flags=re.MULTILINE)] == [
        "0",
        "1",
        "2",
        "3",
        "130",
    ]
    main(["variants", "list", *config])
    for words, status in (
        (["doctor", *config], 1),  # its engines' environment and model are missing
        (["variants", "show", "int3", *config], 2),
        (["status", "--url", "http://127.0.0.1:9"], 2),
        (["nonsense"], 2),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == status
    capsys.readouterr()


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_is_valid(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["completion", shell])
    script = tmp_path / f"tiercel.{shell}"
    script.write_text(capsys.readouterr().out)
    text = script.read_text()
    assert all(name in text for name in ("doctor", "variants", "compare", "demote"))
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed, so its script is not read by it")
    subprocess.run([shell, "-n", str(script)], check=True, timeout=30)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (["tiercel", "va"], ["variants"]),
        (["tiercel", "completion", ""], [*SHELLS]),
        (["tiercel", "watch", "de"], ["demote"]),
        (["tiercel", "status", "--js"], ["--json"]),
        (["tiercel", "doctor", "--config", "some"], ["somewhere.yaml"]),
    ],
)
def test_bash_completes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, line: list[str], wanted: list[str]
) -> None:
    main(["completion", "bash"])
    (tmp_path / "somewhere.yaml").touch()
    asking = """
        words=("$@"); COMP_WORDS=("${words[@]}"); COMP_CWORD=$(($# - 1))
        _shtab_tiercel; printf '%s\\n' "${COMPREPLY[@]}"
    """
    script = capsys.readouterr().out + asking
    ran = subprocess.run(
        ["bash", "-c", script, "bash", *line],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert ran.stdout.split() == wanted
