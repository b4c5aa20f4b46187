"""A disk that is full half-way: one sentence that names it and what is missing, and nothing half-written."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deploy.commands.errors import MENDABLE, explain
from quantize.core.files import NoRoomError
from quantize.core.jsonl import append_kept, read_kept
from quantize.evaluate.bench_engine import FullError, write_arrays
from quantize.evaluate.journal import Journal
from quantize.evaluate.reference import Kept, ReferenceFile

SIZE = 400_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={SIZE // 1000}k", "none"]
    if os.geteuid() or subprocess.run(["mount", *options, place]).returncode:
        pytest.skip("this machine mounts no tmpfs")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(disk: Path, left: int) -> Path:
    """Take all room of a disk but so many bytes."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - left)))
    return ballast


def said(error: BaseException, tmp_path: Path) -> str:
    text, status = explain(error, argparse.Namespace(config=tmp_path / "none.yaml"))
    assert status == MENDABLE
    return text


def test_measuring_says_what_is_missing_and_goes_on(disk: Path, tmp_path: Path) -> None:
    journal = Journal(disk / "measurements" / "answers.json.gz")
    journal.append([{"answer": "one"}])
    hidden = ReferenceFile(disk / "measurements" / "reference.bin")
    kept = Kept("hidden", {"width": 4, "dtype": "BF16", "head": "x"}, os.urandom(40_000))
    hidden.append("core", 0, [1, 2, 3], 1, kept)
    ballast = fill(disk, 20_000)
    before = {path: path.read_bytes() for path in (journal.path, hidden.path)}
    more = [{"answer": os.urandom(40_000).hex()}]
    for write in (lambda: journal.append(more), lambda: hidden.append("core", 1, [1, 2, 3], 1, kept)):
        with pytest.raises(NoRoomError) as error:
            write()
        assert 15_000 < error.value.missing < 45_000
        text = said(error.value, tmp_path)
        assert re.match(
            rf"the disk of {disk}/measurements/\S+ is full; make room for at least \d+ kB more\. F", text
        )
        assert {path: path.read_bytes() for path in before} == before
    ballast.unlink()
    journal.append(more)
    hidden.append("core", 1, [1, 2, 3], 1, kept)
    assert Journal(journal.path).read() == [{"answer": "one"}, *more]
    assert ReferenceFile(hidden.path).read("core", 1) == kept


def test_what_is_kept_line_by_line_stays_whole(disk: Path) -> None:
    rows = disk / "rows.jsonl"
    append_kept(rows, [[1, 2]])
    ballast = fill(disk, 4096)
    with pytest.raises(NoRoomError):
        append_kept(rows, [["x" * 20_000]])
    assert rows.read_text(encoding="utf-8") == "[1, 2]\n"
    ballast.unlink()
    append_kept(rows, [[3]])
    assert read_kept(rows) == [[1, 2], [3]]


def test_what_an_engine_keeps_of_a_reference_is_whole_or_not_there(disk: Path) -> None:
    fill(disk, 50_000)
    with pytest.raises(FullError) as error:
        write_arrays(str(disk / "reference.npz.partial"), hidden=np.zeros(100_000, np.uint8))
    assert error.value.size == 100_000
    assert [path.name for path in disk.iterdir()] == ["ballast"]


WRITING = """
import sys
from pathlib import Path
import torch
from quantize.core.files import NoRoomError
from quantize.make.blocks import States
from quantize.make.smooth import save_whole
disk = Path(sys.argv[1])
for write in (
    lambda: save_whole({"a": torch.zeros(100_000)}, disk / "parts" / "a.safetensors"),
    lambda: States([], many=True).room(torch.zeros(100_000)),
):
    try:
        write()
    except NoRoomError as error:
        print(Path(error.filename).name.partition("-")[0], error.missing)
print(sorted(path.name for path in disk.rglob("*")))
"""


def test_parts_and_hidden_states_that_do_not_fit_are_not_begun(disk: Path) -> None:
    """Hidden states are mapped: a disk that is full when one is written to would end the process."""
    fill(disk, 100_000)
    done = subprocess.run(
        [sys.executable, "-c", WRITING, str(disk)],
        env={**os.environ, "TMPDIR": str(disk), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    part, states, left = done.stdout.splitlines()
    assert re.fullmatch(r"a\.safetensors \d+", part)
    assert re.fullmatch(r"tiercel \d+", states)
    assert all(250_000 < int(line.split()[1]) < 400_000 for line in (part, states))
    assert left == "['ballast', 'parts']"
