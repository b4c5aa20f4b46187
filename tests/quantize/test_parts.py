"""Parts are made once, whoever asks for them, and nobody waits for what is there."""

import multiprocessing
import sys
import threading
from pathlib import Path

import pytest

from quantize.core.checkpoint import open_checkpoint
from quantize.core.files import locked
from quantize.core.modules import read_modules
from quantize.core.plan import uniform
from quantize.core.tensors import read_parts
from quantize.make.parts import PartStore
from tests.quantize.tiny import make_checkpoint

SCHEMES = ("w8a8", "w4a16-g32")


def store_of(folder: Path) -> PartStore:
    checkpoint = open_checkpoint(folder / "model")
    return PartStore(folder / "parts", checkpoint, read_modules(checkpoint), None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "model")
    return tmp_path


def test_parts_that_are_all_there_are_put_together_while_others_are_being_made(folder: Path) -> None:
    """A search over plans makes nothing, and must not wait for a variant that is made beside it."""
    plan = uniform(read_modules(open_checkpoint(folder / "model")), "w8a8", method="rtn")
    store_of(folder).link(plan, folder / "first")
    second = threading.Thread(target=store_of(folder).link, args=(plan, folder / "second"), daemon=True)
    with locked(folder / "parts" / ".lock", "parts", print):
        second.start()
        second.join(60)
        assert not second.is_alive()
    assert read_parts(folder / "second").keys() == read_parts(folder / "first").keys()


def _assemble(folder: Path, scheme: str, ready: object) -> None:
    store = store_of(folder)
    ready.wait()  # type: ignore[attr-defined]
    store.assemble(uniform(store.modules, scheme, method="rtn"), folder / scheme)


def _at_once(folder: Path) -> None:
    """Two processes, forks of one that has only imported."""
    import torch  # noqa: F401

    context = multiprocessing.get_context("fork")
    ready = context.Barrier(len(SCHEMES))
    others = [context.Process(target=_assemble, args=(folder, scheme, ready)) for scheme in SCHEMES]
    for other in others:
        other.start()
    for other in others:
        other.join()
    sys.exit(any(other.exitcode for other in others))


def test_two_processes_share_what_both_need(folder: Path) -> None:
    """Both need embeddings and norms, which are written once."""
    both = multiprocessing.get_context("spawn").Process(target=_at_once, args=(folder,))
    both.start()
    both.join(600)
    assert both.exitcode == 0
    assert all((folder / scheme / "config.json").is_file() for scheme in SCHEMES)
    assert len(list((folder / "parts").glob("kept-*"))) == 1
