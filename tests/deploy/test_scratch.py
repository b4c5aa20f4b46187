"""What a killed process has left is gone after the next one, and nothing that is in use."""

import subprocess
import sys
from pathlib import Path

import pytest

from deploy.scratch import Scratch, remove_left

HOLDER = """
import sys
from deploy.scratch import Scratch

held = Scratch("tiercel-test-")
(held.path / "socket").touch()
print(held.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_it_goes_with_the_process_that_made_it_however_that_ends(temporary: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    theirs = Path(holder.stdout.readline().strip())
    mine = Scratch("tiercel-test-")
    assert theirs.is_dir()
    holder.kill()
    holder.communicate()
    assert theirs.is_dir()
    remove_left("tiercel-test-")
    assert not theirs.exists()
    assert mine.path.is_dir()
    mine.close()
    assert not mine.path.exists()


def test_links_and_others_are_left_alone(temporary: Path) -> None:
    elsewhere, other = temporary / "elsewhere", temporary / "tiercel-else-1"
    for folder in (elsewhere, other):
        folder.mkdir()
        (folder / "file").touch()
    (temporary / "tiercel-test-link").symlink_to(elsewhere)
    (temporary / "tiercel-test-file").touch()
    Scratch("tiercel-test-").close()
    assert (elsewhere / "file").exists()
    assert (other / "file").exists()
    assert (temporary / "tiercel-test-link").is_symlink()
    assert (temporary / "tiercel-test-file").exists()


def test_one_that_was_taken_before_it_was_held_is_made_again(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def mkdtemp(prefix: str) -> str:
        path = temporary / f"{prefix}{len(made)}"
        path.mkdir()
        made.append(path)
        if len(made) == 1:
            path.rmdir()
        return str(path)

    monkeypatch.setattr("tempfile.mkdtemp", mkdtemp)
    held = Scratch("tiercel-test-")
    assert held.path == made[1]
    held.close()
