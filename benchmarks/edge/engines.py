"""Engines of the speed comparison: llama.cpp on a GGUF file, vLLM on the same model in W4A16."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.quantization import real_data
from deploy.engine import EngineSpec, free_port, running
from deploy.placement import Placed
from gateway.config import Engine as EngineSettings
from quantize.card import LLAMA, Card
from quantize.core.checkpoint import open_checkpoint
from quantize.core.modules import read_modules
from quantize.core.recipes import RECIPES
from quantize.core.targets import detect, target
from quantize.evaluate.client import EngineClient
from quantize.export.gguf_file import read_gguf
from quantize.export.variant import MODEL_FILE, described
from quantize.registry import Registry

PYTHON = Path(".venv-engine/bin/python")
CONTEXT = 1024


def settings(threads: int) -> EngineSettings:
    return EngineSettings(
        python=Path.cwd() / PYTHON,
        max_model_len=CONTEXT,
        kv_cache_gib=1,
        max_num_seqs=8,
        env={"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )


@asynccontextmanager
async def started(card: Card, directory: Path, work: Path, threads: int) -> AsyncIterator[EngineClient]:
    """A client of an engine that is ready inside the block."""
    spec = EngineSpec(
        card=card,
        directory=directory,
        settings=settings(threads),
        port=free_port("127.0.0.1"),
        log=work / f"engine-{card.variant}.log",
        placed=Placed(),
    )
    async with running(spec, print), EngineClient(spec.url, card.model) as client:
        yield client


def linked(path: Path, work: Path) -> Path:
    """A directory in which a file is called as a variant's is."""
    directory = work / "served" / path.stem
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / MODEL_FILE).exists():
        (directory / MODEL_FILE).symlink_to(path.resolve())
    return directory


@asynccontextmanager
async def llama_engine(path: Path, work: Path, threads: int) -> AsyncIterator[EngineClient]:
    """llama.cpp's server on a file, as ``tiercel up`` starts it."""
    directory = linked(path, work)
    checkpoint = open_checkpoint(real_data.real_model(work.parent / "real" / "model"))
    card = Card.model_validate(
        {
            "model": "real",
            "variant": path.stem,
            "reference": "bf16",
            "scheme": path.stem,
            "method": "none",
            "created": "",
            "versions": {},
            "files": {},
            "max_model_len": checkpoint.max_model_len,
            **described(checkpoint, read_gguf(path)),
            "target": LLAMA,
        }
    )
    async with started(card, directory, work, threads) as client:
        yield client


@asynccontextmanager
async def vllm_engine(real: Path, work: Path, threads: int) -> AsyncIterator[tuple[EngineClient, str]]:
    """vLLM on the variant ``int4`` of the recipes (W4A16), made where it is missing, and its label."""
    checkpoint = open_checkpoint(real_data.real_model(real / "model"))
    texts = real_data.texts(real / "model", real / "texts.json")
    registry = Registry(work / "variants", "real", "bf16", print)
    registry.add_reference(checkpoint)
    where = target(detect())
    plan = RECIPES["int4"].plan(read_modules(checkpoint), where)
    card = registry.add(checkpoint, "int4", plan, texts.calibration(32), target=where.name)
    directory = registry.path("int4", card.version)
    async with started(card, directory, work, threads) as client:
        yield client, f"vLLM {plan.describe()}"
