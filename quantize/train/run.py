"""One training run: a model, examples, a method; an adapter or a checkpoint, and the record of it.

>>> record = run(Job("qlora", checkpoint, train, held_out, settings, out=Path("var/intents")), say)
>>> record.held_out.right.good, record.memory.measured
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.core.checkpoint import Checkpoint, base_sha256
from quantize.core.files import locked
from quantize.core.modules import Modules, read_modules
from quantize.core.resources import freed_at_once, measured
from quantize.core.tokenizer import load_tokenizer
from quantize.train.adapters import WEIGHTS, Lora, described, trained_tensors, wrapped, write_adapter
from quantize.train.answers import judge, loss_of
from quantize.train.base import Base, Method, load_base, refuse_untrainable
from quantize.train.data import Examples
from quantize.train.distill import Lessons, Teaching, refuse_unlike, with_teacher
from quantize.train.identity import tokenizer_sha256
from quantize.train.loop import Outcome, Place, Settings, TrainError, train
from quantize.train.memory import Need, Shape, predict, refuse_beyond
from quantize.train.merge import write_full
from quantize.train.record import (
    RECORD,
    DataUsed,
    HeldOut,
    MemoryUsed,
    Record,
    paired,
    read_record,
    write_record,
)

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER, MODEL, RUN = "adapter", "model", "run"
"""Folders of a run's directory: the adapter, the whole model where that was trained, the checkpoint."""
LOCK = ".training"
"""File of a run's directory that is held while it is trained in."""
JUDGE_TOKENS = 2048
"""Padded tokens of held-out examples that go through the model at once."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What is to be done. ``sources`` say what the data are called; ``memory`` is a budget in GB."""

    method: Method
    checkpoint: Checkpoint
    examples: Examples
    held_out: Examples
    settings: Settings
    out: Path
    lora: Lora = field(default_factory=Lora)
    memory: float | None = None
    checkpointing: bool | None = None
    """None: where the budget asks for it."""
    device: str | None = None
    sources: tuple[str, str] = ("", "")
    teaching: Teaching | None = None
    """Whom the model learns from, where it is not from right answers alone."""
    nf4: str | None = None
    """Whose modules ``qlora`` keeps the base in; None: as :func:`quantize.train.nf4.whose` chooses."""

    @property
    def label(self) -> str:
        return "distill" if self.teaching is not None else self.method


def run(job: Job, say: Say) -> Record:
    """Train, or go on with what was begun in ``job.out``, or return what was finished there.

    Raises TrainError, before work for what cannot be, and CheckpointError.
    """
    modules = read_modules(job.checkpoint)
    refuse_untrainable(job.checkpoint, modules)
    if job.teaching is not None:
        refuse_unlike(job.checkpoint, job.teaching)
    if (record := finished(job)) is not None:
        say(f"{job.out}: finished before, with the same model, data and settings")
        return record
    shape, need = fitting(job, modules)
    with locked(job.out / LOCK, f"training in {job.out}", say):
        if (record := finished(job)) is not None:  # by whoever was waited for
            return record
        again = ", with blocks computed again in the backward pass" if shape.checkpointing else ""
        needed = f"{need.total / 1e9:.2f} GB predicted beside the program itself ({need.text()}){again}"
        say(f"{job.label}: {needed}")
        return _work(job, modules, _identity(job, modules), shape, need, say)


def finished(job: Job) -> Record | None:
    """The record of the run where it was finished in ``job.out`` and what it made is there. Threads do not
    matter then. Raises TrainError where another run is there."""
    if not (job.out / RECORD).is_file():
        return None
    record = read_record(job.out)
    identity = _decides(job, read_modules(job.checkpoint))
    names = [*identity, *(name for name in record.run if name != "threads")]
    if changed := [name for name in names if record.run.get(name) != identity.get(name)]:
        raise TrainError(
            f"{job.out} holds another run, with other {changed[0]}; give another --out, or remove it"
        )
    made = job.out / MODEL if job.method == "full" else job.out / ADAPTER / WEIGHTS
    return record if made.exists() else None


def fitting(job: Job, modules: Modules) -> tuple[Shape, Need]:
    """How examples go through the model, and what that takes. Raises TrainError beyond the budget."""
    longest = max(len(one.ids) for one in job.examples.examples)
    together = min(job.settings.together, job.settings.batch, len(job.examples.examples))
    keep, free = job.examples.most_labels, _free(job)
    width = 4 if job.method == "full" or _on_processor(job) else 2
    for checkpointing in (False, True) if job.checkpointing is None else (job.checkpointing,):
        shape = Shape(together, longest, keep, checkpointing)
        need = predict(job.checkpoint, modules, job.method, job.lora, shape, width)
        if job.teaching is not None:
            of_teacher = read_modules(job.teaching.teacher)
            need = with_teacher(need, job.teaching, of_teacher, shape, width)
        if need.total <= (free if job.memory is None else job.memory * 1e9):
            return shape, need
    smaller = "" if together == 1 else f", --together {max(1, together // 2)}"
    other = {"full": "lora or qlora", "lora": "qlora", "qlora": "a smaller --rank or --length"}
    tried = other[job.method] if job.teaching is None else "a smaller --length"
    if job.memory is None:
        raise TrainError(
            f"{need.total / 1e9:,.2f} GB are needed beside the program itself ({need.text()}), and "
            f"{free / 1e9:.1f} GB are free; try {tried}{smaller}; --memory says what may be taken anyway"
        )
    refuse_beyond(need, job.memory, f"try {tried}{smaller}, or give more")
    return shape, need


def _free(job: Job) -> int:
    """Bytes that are free where the job runs, which a job without a budget is held to."""
    import torch

    from quantize.make.blocks import best_device, free_memory

    return free_memory(torch.device(job.device) if job.device else best_device())


def _on_processor(job: Job) -> bool:
    from quantize.make.blocks import best_device

    return (job.device or best_device().type).startswith("cpu")


def _work(
    job: Job, modules: Modules, identity: Mapping[str, str], shape: Shape, need: Need, say: Say
) -> Record:
    program = _program_bytes(job.checkpoint)
    # Blocks that are computed again save memory for time; what the heap would keep is a part of that.
    sparing = shape.checkpointing and _on_processor(job)
    with freed_at_once() if sparing else contextlib.nullcontext(), measured() as taken:
        base = load_base(job.checkpoint, job.method, job.device, job.nf4)
        model = base.model
        if job.method != "full":
            model = wrapped(model, job.lora, modules, job.checkpoint.path, job.settings.seed)
        if shape.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        outcome = _train(job, base, model, identity)
        _write(job, base, model)
        device = base.device.type
        del base, model
        gc.collect()
    peak = taken.peak_device_bytes if device != "cpu" else taken.peak_memory_bytes
    beside = peak if peak is None or device != "cpu" else max(0, peak - program)
    memory = MemoryUsed(
        predicted=need.total,
        measured=beside,
        program=program,
        device=device,
        parts=asdict(need),
        checkpointing=shape.checkpointing,
    )
    record = _record(job, modules, identity, outcome, memory)
    write_record(record, job.out)
    _say_result(record, say)
    return record


def _train(job: Job, base: Base, model: Any, identity: Mapping[str, str]) -> Outcome:
    tokenizer = load_tokenizer(job.checkpoint.path)
    examples = job.examples.examples
    lessons = Lessons(job.teaching, model, base.device) if job.teaching is not None else None

    def loss(_step: int, numbers: Sequence[int]) -> tuple[Tensor, float]:
        some = [examples[number] for number in numbers]
        return lessons.loss(model, some) if lessons is not None else loss_of(model, some, base.device)

    def evaluate(_step: int) -> dict[str, Any]:
        found = judge(model, job.held_out.examples, tokenizer, base.device, JUDGE_TOKENS)
        return {"loss": found.loss, "right": "".join("01"[one] for one in found.right)}

    place = Place(job.out / RUN, identity)
    trained = trained_tensors(model)
    return train(
        trained, loss, len(examples), job.settings, place, evaluate, label=f"{job.label} {job.out.name}"
    )


def _write(job: Job, base: Base, model: Any) -> None:
    if job.method == "full":
        write_full(base, job.out / MODEL)
    else:
        write_adapter(model, job.out / ADAPTER)


def _identity(job: Job, modules: Modules) -> dict[str, str]:
    """What a run's result depends on. Threads are part of it: sums are added in their order."""
    import torch

    return {**_decides(job, modules), "threads": str(torch.get_num_threads())}


def _decides(job: Job, modules: Modules) -> dict[str, str]:
    """What a person has decided of it."""
    found = {
        "method": job.method,
        "model": base_sha256(job.checkpoint),
        "tokenizer": tokenizer_sha256(job.checkpoint),
        "data": job.examples.sha256,
        "held_out": job.held_out.sha256,
        "rate": f"{job.settings.learning_rate:g}",
        "steps": str(job.settings.steps),
        "batch": f"{job.settings.batch}/{job.settings.together}",
        "schedule": repr(
            dataclasses.replace(job.settings, evaluate_every=0, keep_every=1, learning_rate=1, steps=1)
        ),
    }
    if job.method != "full":
        found["lora"] = repr(described(job.lora, modules))
    if job.teaching is not None:
        found |= job.teaching.identity()
    if _of_bitsandbytes(job):
        found["nf4"] = "bitsandbytes"
    return found


def _of_bitsandbytes(job: Job) -> bool:
    """Whether the base is kept in bitsandbytes' modules."""
    from quantize.make.blocks import best_device
    from quantize.train.nf4 import whose

    return job.method == "qlora" and whose(job.nf4, job.device or best_device()) == "bitsandbytes"


def _program_bytes(checkpoint: Checkpoint) -> int:
    """What this process takes before anything is loaded: libraries, what they set up when they are first
    used, and the examples."""
    import peft  # noqa: F401  # belongs to the program, and is large
    import psutil
    import torch

    from quantize.make.blocks import skeleton

    skeleton(checkpoint, torch.float32)
    tensor = torch.ones(64, 64, requires_grad=True)
    torch.nn.functional.linear(tensor, tensor).sum().backward()  # type: ignore[no-untyped-call]
    return int(psutil.Process(os.getpid()).memory_info().rss)


def _record(
    job: Job, modules: Modules, identity: Mapping[str, str], outcome: Outcome, memory: MemoryUsed
) -> Record:
    before, after = outcome.evaluations[0].figures, outcome.evaluations[-1].figures
    flags = [[one == "1" for one in figures["right"]] for figures in (after, before)]
    names = ["torch", "transformers", "peft", "tiercel", *["bitsandbytes"] * _of_bitsandbytes(job)]
    return Record(
        method=job.method,
        base=job.checkpoint.path.resolve().name,
        run=dict(identity),
        data=_used(job.examples, job.sources[0]),
        held_out_data=_used(job.held_out, job.sources[1]),
        settings=asdict(job.settings),
        lora=described(job.lora, modules) if job.method != "full" else None,
        teaching=job.teaching.described() if job.teaching is not None else None,
        curve=[(point.step, point.loss, point.norm, point.rate) for point in outcome.points],
        evaluations=[
            (one.step, one.figures["loss"], one.figures["right"].count("1") / len(one.figures["right"]))
            for one in outcome.evaluations
        ],
        held_out=HeldOut(
            loss_before=before["loss"],
            loss_after=after["loss"],
            right=paired(flags[0], flags[1]),
            answers_before=before["right"],
            answers_after=after["right"],
        ),
        seconds=outcome.seconds,
        memory=memory,
        versions={name: version(name) for name in names},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _used(examples: Examples, source: str) -> DataUsed:
    return DataUsed(
        source=source,
        sha256=examples.sha256,
        examples=len(examples.examples),
        tokens=examples.tokens,
        labels=examples.labels,
        cut=examples.cut,
    )


def _say_result(record: Record, say: Say) -> None:
    right, memory = record.held_out.right, record.memory
    took = "not measured" if memory.measured is None else f"{memory.measured / 1e9:.2f} GB measured"
    say(
        f"held out: {right.good} of {right.items} right after {record.settings['steps']} steps, "
        f"{right.reference_good} before (loss {record.held_out.loss_before:.3f} to "
        f"{record.held_out.loss_after:.3f}); {record.seconds:.0f} s; {took} beside the program, "
        f"{memory.predicted / 1e9:.2f} GB predicted"
    )
