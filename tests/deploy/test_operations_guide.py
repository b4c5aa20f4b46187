"""The operator's guide is true: its commands run, one after the other in one shell, against a gateway with
fake engines; its YAML is valid; what it names of the chart exists."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from gateway.config import parse_config
from gateway.upstream.fake import FakeEngine
from quantize.card import write_card
from quantize.core.files import point
from tests.helm.chart import refusal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gateway"))

from gateway_stack import eventually, free_port, make_cards, settings, write_variants

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/operations.md"
TEXT = PAGE.read_text(encoding="utf-8")
ELSEWHERE = {"make", "cluster", "database"}
"""Info strings of commands that need what is not here."""
MARK = "@@ block"


@dataclass(frozen=True)
class Block:
    language: str
    info: str
    text: str


def blocks(*languages: str) -> list[Block]:
    found = re.findall(r"^```(\w+) ?(\w*)\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
    return [Block(*one) for one in found if one[0] in languages]


def script(page: list[Block]) -> tuple[str, dict[str, str]]:
    """One shell script of all blocks, and what each command of a console block is to print."""
    lines, wanted = ["exec 2>&1"], {}
    for number, block in enumerate(page):
        if block.language == "sh":
            lines += ["set -e", f"echo '{MARK} {number}'", block.text, "set +e"]
            continue
        for place, part in enumerate(re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]):
            command, _, output = part.partition("\n")
            wanted[f"{number}.{place}"] = output
            lines += [f"echo '{MARK} {number}.{place}'", command]
    return "\n".join([*lines, f"echo '{MARK} end'"]), wanted


def matches(shown: str, wanted: str) -> bool:
    """Whether it is what the guide shows, where ``…`` stands for anything."""
    pattern = ".*".join(re.escape(part) for part in wanted.strip().split("…"))
    return re.fullmatch(pattern, shown.strip(), flags=re.DOTALL) is not None


def older_version(variants: Path) -> str:
    """A version of int8 from before the one in use."""
    weights = b"weights of yesterday"
    card = make_cards()["assistant:int8"]
    digest = hashlib.sha256(weights).hexdigest()
    card = card.model_copy(update={"files": {"model.safetensors": digest}, "created": "2026-11-19"})
    directory = variants / "assistant/int8" / card.version
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(weights)
    write_card(card, directory)
    point(directory.parent / "current", make_cards()["assistant:int8"].version)
    return card.version


@asynccontextmanager
async def installation(directory: Path, port: int) -> AsyncIterator[None]:
    """``tiercel up`` in a directory with variants, over engines that are fakes."""
    write_variants(directory / "var/variants")
    async with AsyncExitStack() as exits:
        urls = {v: [await exits.enter_async_context(FakeEngine().serving())] for v in make_cards()}
        fields: dict[str, Any] = {"gateway": {"port": port}, "run_dir": "var/run", "watch": {"rate": 1.0}}
        path = directory / "tiercel.yaml"
        path.write_text(settings(Path("var/variants"), urls, **fields), encoding="utf-8")
        up = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "deploy.cli", "up", "--config", str(path)),
            cwd=directory,
            env=environment(),
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )

        url = f"http://127.0.0.1:{port}/readiness"

        async def ready() -> bool:
            assert up.returncode is None, (directory / "var/run/logs/gateway.log").read_text()
            try:
                async with aiohttp.ClientSession() as http, http.get(url) as response:
                    return response.status == 200
            except aiohttp.ClientError:
                return False

        try:
            await eventually(ready, within_s=90)
            yield
        finally:
            up.send_signal(signal.SIGTERM)
            async with asyncio.timeout(60):
                assert await up.wait() == 0


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TIERCEL_KEY"}
    return {**kept, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}"}


@pytest.mark.skipif(
    not all(map(shutil.which, ("sqlite3", "openssl", "pkill"))), reason="needs sqlite3, openssl and pkill"
)
async def test_the_commands_run(tmp_path: Path) -> None:
    page = [block for block in blocks("sh", "console") if block.info not in ELSEWHERE]
    text, wanted = script(page)
    port = free_port()
    async with installation(tmp_path, port):
        older = older_version(tmp_path / "var/variants")
        text = text.replace("8080", str(port)).replace("OLDER", older)
        shell = await asyncio.create_subprocess_exec(
            *("bash", "-c", text),
            cwd=tmp_path,
            env=environment(),
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(600):
            shown = (await shell.communicate())[0].decode()
    parts = re.split(rf"^{MARK} (\S+)\n", shown, flags=re.MULTILINE)
    outputs = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert "end" in outputs, f"a command failed:\n{shown}"
    assert wanted
    for place, output in wanted.items():
        expected = output.replace("8080", str(port)).replace("OLDER", older)
        assert matches(outputs[place], expected), f"shown:\n{outputs[place]}\nin the guide:\n{expected}"
    log = (tmp_path / "var/run/logs/gateway.log").read_text(encoding="utf-8")
    assert log.count("the configuration was read anew") == 3
    assert "the configuration was not changed" not in log
    assert os.readlink(tmp_path / "var/variants/assistant/int8/current") == older


def test_every_command_is_run_or_marked() -> None:
    marked = {block.info for block in blocks("sh", "console") if block.info}
    assert marked == ELSEWHERE
    assert set(re.findall(r"^```(\w+)", TEXT, flags=re.MULTILINE)) == {"sh", "console", "yaml", "ini"}


def test_the_yaml_is_valid(tmp_path: Path) -> None:
    base = settings(tmp_path, {})
    pieces = [block for block in blocks("yaml") if not block.info]
    assert len(pieces) == 3
    for piece in pieces:
        config = parse_config(yaml.safe_dump(yaml.safe_load(base) | yaml.safe_load(piece.text)), "", tmp_path)
        for section in yaml.safe_load(piece.text):
            assert getattr(config, section)


def test_the_chart_takes_the_values_that_the_guide_gives() -> None:
    chart = yaml.safe_load((ROOT / "helm/tiercel/values.yaml").read_text(encoding="utf-8"))
    (values,) = (yaml.safe_load(block.text) for block in blocks("yaml") if block.info == "values")
    assert "`tiercel keys new NAME` makes a key" in refusal(values), "it has none yet"
    values["gateway"]["config"]["keys"] = [{"name": "ops", "sha256": "0" * 64}]
    assert refusal(values) == "accepted"
    for name in re.findall(
        r"`((?:gateway|quantize|ingress)\.(?:tlsSecret|enabled|replicas|autoscaling))", TEXT
    ):
        section, key = name.split(".")
        assert key in chart[section]


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links
    assert [link for link in links if not (PAGE.parent / link).exists()] == []
