"""Files that are written as a whole: by several writers at once, and by one that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quantize.core.files import whole_file, write_whole

KILLED = """
import os, signal, sys
from pathlib import Path
from quantize.core.files import whole_file
with whole_file(Path(sys.argv[1]), 4) as file:
    file.write(b"ha")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def _names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "blocks.json"
    with whole_file(path, 3) as first:
        first.write(b"fi")
        first.flush()
        with whole_file(path, 6) as second:
            second.write(b"second")
            assert len(_names(tmp_path)) == 2, "the living one's is not removed"
        assert path.read_bytes() == b"second"
        first.write(b"rst")
    assert path.read_bytes() == b"first"
    assert _names(tmp_path) == ["blocks.json"]


def test_what_a_killed_writer_left_the_next_one_removes(tmp_path: Path) -> None:
    path = tmp_path / "blocks.json"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(_names(tmp_path)) == 1
    write_whole(tmp_path / "blocks", "of another name")
    assert len(_names(tmp_path)) == 2
    write_whole(path, "{}")
    assert _names(tmp_path) == ["blocks", "blocks.json"]


def test_nothing_is_left_of_a_writer_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "blocks.json"
    write_whole(path, "{}")
    with pytest.raises(TypeError), whole_file(path, 4) as file:
        file.writelines([b"half", "text"])  # type: ignore[list-item]
    assert _names(tmp_path) == ["blocks.json"]
    assert path.read_text(encoding="utf-8") == "{}"
