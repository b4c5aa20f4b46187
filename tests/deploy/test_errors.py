"""Whatever goes wrong leaves the command line as one sentence, with the fix or the place of the traceback."""

import argparse
import errno
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy import cli
from deploy.commands.errors import MENDABLE, UNFORESEEN, explain, sentence
from quantize.core.checkpoint import CheckpointError, open_checkpoint
from quantize.registry import Registry
from tests.quantize.small import write_base

SafetensorError = type("SafetensorError", (Exception,), {"__module__": "safetensors_rust"})
OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})
FULL = OSError(errno.ENOSPC, "No space left on device", "/data/variants/model.safetensors")


@pytest.fixture(autouse=True)
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            FULL,
            "the disk of /data/variants/model.safetensors is full; make room. Files that were being",
        ),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "(standard output, a disk or its quota) is full",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/home/me"), "the disk of /home/me is full"),
        (OSError(errno.EFBIG, "File too large"), "larger than this process may write; raise the limit"),
        (MemoryError(), "memory ran out (MemoryError); use fewer calibration tokens"),
        (
            OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"),
            "(CUDA out of memory. Tried to",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory ran out"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/root/x"),
            "/root/x: Permission denied; change its",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/ro/x"), "/ro/x: Read-only file system; change its"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/no"),
            "/no: No such file or directory; check",
        ),
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
            "not UTF-8 (invalid start byte at byte 0)",
        ),
        (
            SafetensorError("Error while deserializing header: incomplete"),
            "a safetensors file cannot be read or",
        ),
    ],
)
def test_what_libraries_and_the_system_raise_is_put_into_words(error: BaseException, words: str) -> None:
    assert words in (sentence(error) or "")


def told(capsys: pytest.CaptureFixture[str], raised: BaseException, config: Path) -> tuple[str, int]:
    """What the command line says when a command raises that."""

    def run(_: argparse.Namespace) -> None:
        raise raised

    parser = argparse.ArgumentParser()
    parser.set_defaults(run=run, config=config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "parser", lambda: parser)
        with pytest.raises(SystemExit) as ended:
            cli.main([])
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert text.count("\n") == 1
    return text, int(str(ended.value.code))


def test_the_traceback_of_what_nobody_foresaw_is_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "tiercel.yaml"
    model = write_base(tmp_path / "model")
    config.write_text(
        f"models: {{m: {{path: {model}, serve: [bf16]}}}}\nroles: {{core: {{}}}}\ndefault_role: core\n"
        "variants_dir: variants\n",
        encoding="utf-8",
    )
    text, status = told(capsys, ZeroDivisionError("division by zero"), config)
    assert status == UNFORESEEN
    assert text.startswith("tiercel: unforeseen: ZeroDivisionError: division by zero (the traceback is in ")
    kept = Path(text.split("the traceback is in ")[1].rstrip(")\n"))
    assert kept.parent == tmp_path / "variants" / ".logs"
    assert "ZeroDivisionError: division by zero" in kept.read_text(encoding="utf-8")


def test_of_several_exceptions_the_one_to_mend_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    group = ExceptionGroup("engines", [KeyError("x"), ExceptionGroup("more", [CheckpointError("do this")])])
    assert told(capsys, group, tmp_path / "none.yaml") == ("tiercel: do this\n", MENDABLE)
    text, status = told(capsys, ExceptionGroup("engines", [KeyError("x"), FULL]), tmp_path / "none.yaml")
    assert status == MENDABLE
    assert "is full; make room" in text
    assert explain(KeyError("x"), argparse.Namespace())[1] == UNFORESEEN


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", disk]).returncode:
        pytest.skip("this machine mounts no tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_nothing_half_made(small_disk: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_base(tmp_path / "model"))
    registry = Registry(small_disk / "variants", "m", "bf16")
    registry.add_reference(checkpoint)
    free = shutil.disk_usage(small_disk).free
    other = open_checkpoint(Path(shutil.copytree(checkpoint.path, tmp_path / "other")))
    config = json.loads((other.path / "config.json").read_text(encoding="utf-8"))
    (other.path / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}), encoding="utf-8")
    (other.path / "model.safetensors").write_bytes((other.path / "model.safetensors").read_bytes())
    with (small_disk / "ballast").open("wb") as file:
        file.write(bytes(free - 100_000))
    with pytest.raises(OSError, match="No space left on device") as error:
        registry.add_reference(open_checkpoint(other.path))
    assert "is full; make room" in (sentence(error.value) or "")
    assert len(registry.versions("bf16")) == 1
    assert not list(registry.directory.glob(".partial-*"))
    registry.card("bf16")


def test_a_full_disk_is_named_though_the_system_does_not_say_which(
    capsys: pytest.CaptureFixture[str], small_disk: Path, tmp_path: Path
) -> None:
    config = tmp_path / "tiercel.yaml"
    config.write_text(
        f"models: {{m: {{path: {tmp_path}, serve: [bf16]}}}}\nroles: {{core: {{}}}}\ndefault_role: core\n"
        f"variants_dir: {small_disk}/variants\n",
        encoding="utf-8",
    )
    text, status = told(capsys, OSError(errno.ENOSPC, "No space left on device"), config)
    assert status == MENDABLE
    assert text.startswith(f"tiercel: the disk of {small_disk} is full; make room. Files that were being")


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    model = Path(__file__).resolve().parents[2] / "deploy/assistant/model"

    def write(items: str, python: str = "/bin/sh") -> Path:
        (tmp_path / "core.jsonl").write_text(items, encoding="utf-8")
        path = tmp_path / "tiercel.yaml"
        path.write_text(
            f"models: {{m: {{path: {model}, serve: [bf16]}}}}\nroles: {{core: {{tasks: core.jsonl}}}}\n"
            f"default_role: core\nengine: {{python: {python}}}\nvariants_dir: {tmp_path}/variants\n",
            encoding="utf-8",
        )
        return path

    return write


@pytest.mark.parametrize(
    ("items", "python", "words"),
    [
        ("{\n", "/bin/sh", "core.jsonl:1:"),
        ("\n", "/bin/sh", "is empty"),
        (
            '{"messages": [{"role": "user", "content": "x"}], "expected": "y"}\n',
            "/no/python",
            "no engine environment",
        ),
        (
            '{"messages": [{"role": "wizard", "content": "x"}], "expected": "y"}\n',
            "/bin/sh",
            "roles.core: item 1: ",
        ),
    ],
)
def test_what_would_stop_the_measuring_is_said_before_anything_is_made(
    capsys: pytest.CaptureFixture[str], write_config, tmp_path: Path, items: str, python: str, words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["quantize", "make", "int8", "--config", str(write_config(items, python))])
    assert ended.value.code == MENDABLE
    assert words in capsys.readouterr().err
    assert not (tmp_path / "variants").exists()
