"""Roles without tasks, and models without calibration: the conversations that ship with the product, answered
by the reference once. So are questions in a model's own calibration file.

Answers that judge belong to the engine that they were written on; those that calibrate do not, so that an
upgrade of the engine makes no variant anew.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.engine import EngineSpec, need_of, running
from deploy.identity import identity
from deploy.machine import look
from deploy.models import checkpoint_of, registry_of
from deploy.placement import Machine, Seats
from deploy.ports import free_port
from gateway.config import ModelConfig, RoleSettings
from quantize.card import Card, CardError, read_card
from quantize.core.checkpoint import Checkpoint
from quantize.core.tokenizer import encode_messages, load_tokenizer
from quantize.evaluate.answers import (
    Asking,
    Encode,
    answer_all,
    answers_path,
    fitting,
    items_of,
    read_answers,
)
from quantize.evaluate.client import EngineClient
from quantize.evaluate.conversations import Conversation, chosen, read_conversations, template_kwargs
from quantize.evaluate.journal import Journal
from quantize.evaluate.tasks import Item
from quantize.make.calibration import (
    CalibrationSet,
    calibration_length,
    calibration_of,
    read_calibration,
    read_questions,
)

CPU_CALIBRATING, CPU_JUDGING = 192, 96
"""Conversations on a processor, where the configuration says nothing. Variants of a small model gained by
twice as many to calibrate with as to judge (docs/benchmarks/quantization.md); two cores answer them in four
minutes."""
CPU_TOKENS, GPU_TOKENS = 64, 256
"""Of an answer, where the configuration says nothing."""
OWN = "own-"
"""Before the line's number, what a question of the model's own calibration file is called."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Questions:
    """What a model's reference is asked in one way, and where its answers lie."""

    asking: Asking
    conversations: tuple[Conversation, ...]
    left_out: int
    """Those of where they come from that the model's context or chat template does not take."""
    journal: Journal

    @property
    def missing(self) -> bool:
        known = read_answers(self.journal)
        return any(one.id not in known for one in self.conversations)

    def items(self) -> list[Item]:
        """Of those that judge: as far as they are answered."""
        return items_of(self.conversations, read_answers(self.journal), self.asking)

    def told(self, purpose: str) -> str:
        left = f", {self.left_out} of all being too long for it or nothing for its chat template"
        return (
            f"the reference answers {len(self.conversations)} conversations to {purpose}"
            f"{left if self.left_out else ''}, in at most {self.asking.max_tokens} tokens each "
            "(conversations.count and .max_tokens)"
        )


def unlabelled_roles(model: ModelConfig) -> dict[str, RoleSettings]:
    """Roles that are judged by the reference's own answers."""
    return {name: role for name, role in model.roles.items() if role.tasks is None}


def judging(model: ModelConfig, version: str, role: RoleSettings | None = None) -> Questions:
    """What the reference of that version is asked, for a role that may say how, to judge variants by."""
    way, machine = _Way.of(model, role), look()
    everything, fits = way.shipped()
    _, count = _counts(model, machine)
    path = answers_path(model.variants_dir, version, way.asking, everything, identity(model, machine))
    held_out = tuple(chosen(fits, "held_out", count))
    return Questions(way.asking, held_out, len(everything) - len(fits), Journal(path))


def calibrating(model: ModelConfig, version: str) -> Questions | None:
    """What it is asked to calibrate with: of the model's own file what ends with a question, or of the
    conversations that ship. None where the file asks nothing. Raises CalibrationError."""
    asked = read_questions(model.calibration) if model.calibration is not None else None
    if asked == {}:
        return None
    way = _Way.of(model)
    if asked is None:
        everything, fits = way.shipped()
        wanted = tuple(chosen(fits, "calibration", _counts(model, look())[0]))
    else:
        everything = tuple(
            Conversation(id=f"{OWN}{line}", domain="own", messages=messages)
            for line, messages in asked.items()
        )
        fits = wanted = way.fitting(everything)
    path = answers_path(model.variants_dir, version, way.asking, everything, {})
    return Questions(way.asking, wanted, len(everything) - len(fits), Journal(path))


@dataclass(frozen=True)
class _Way:
    """How a model's reference is asked."""

    source: Path
    context: int
    asking: Asking

    @classmethod
    def of(cls, model: ModelConfig, role: RoleSettings | None = None) -> _Way:
        checkpoint = checkpoint_of(model)
        tokens = (role.max_tokens if role else None) or model.conversations.max_tokens
        asking = Asking(
            tokens or (GPU_TOKENS if look().gpus else CPU_TOKENS),
            (role.chat_template_kwargs if role else None) or template_kwargs(_template(checkpoint.path)),
        )
        context = model.engine.context(checkpoint.max_model_len, checkpoint.kv_bytes_per_token(2))
        return cls(checkpoint.path, context, asking)

    def shipped(self) -> tuple[tuple[Conversation, ...], tuple[Conversation, ...]]:
        """Conversations that ship, all and those that fit."""
        return tuple(read_conversations()), _fitting(self.source, self.context, self.asking.max_tokens)

    def fitting(self, own: Sequence[Conversation]) -> tuple[Conversation, ...]:
        """Of somebody's own those that fit, as they are."""
        encode = _encoding(self.source)
        return tuple(fitting(own, encode, self.context, self.asking, as_they_are=True))


def _counts(model: ModelConfig, machine: Machine) -> tuple[int | None, int | None]:
    """Conversations that calibrate and that judge; None for all."""
    if (count := model.conversations.count) is not None:
        return count // 2, count // 2
    return (None, None) if machine.gpus else (CPU_CALIBRATING, CPU_JUDGING)


def usual_lengths(checkpoint: Checkpoint) -> list[int]:
    """Tokens of the conversations that calibrate where nothing is configured, with answers as long as they
    may be. Raises CheckpointError."""
    gpus, tokenizer = look().gpus, load_tokenizer(checkpoint.path)
    tokens, count = (GPU_TOKENS, None) if gpus else (CPU_TOKENS, CPU_CALIBRATING)
    fits = _fitting(checkpoint.path, checkpoint.max_model_len, tokens)
    asked = (
        encode_messages(tokenizer, one.messages, checkpoint.path)
        for one in chosen(fits, "calibration", count)
    )
    longest = calibration_length(checkpoint)
    return [min(longest, len(ids) + tokens) for ids in asked]


def prompts_for(checkpoint: Checkpoint, count: int) -> CalibrationSet:
    """Prompts of so many of the conversations that ship with the product, for a model that is in no
    configuration. Raises CheckpointError."""
    found = shipped_prompts(checkpoint, count)
    return calibration_of(found, "conversations of Tiercel, prompts alone", checkpoint)


def shipped_prompts(checkpoint: Checkpoint, count: int) -> list[tuple[dict[str, str], ...]]:
    """What so many of the conversations that ship ask, of those that suit a model. Raises CheckpointError."""
    fits = _fitting(checkpoint.path, checkpoint.max_model_len, CPU_TOKENS)
    return [one.messages for one in chosen(fits, "calibration", count)]


@functools.lru_cache(maxsize=4)
def _template(path: Path) -> str:
    return str(load_tokenizer(path).chat_template)


@functools.lru_cache(maxsize=4)
def _fitting(path: Path, context: int, max_tokens: int) -> tuple[Conversation, ...]:
    return tuple(fitting(read_conversations(), _encoding(path), context, Asking(max_tokens)))


def _encoding(path: Path) -> Encode:
    tokenizer = load_tokenizer(path)
    return lambda messages: encode_messages(tokenizer, messages, path)


def version_in_use(model: ModelConfig) -> str:
    """The version of the reference that is there, or an empty string."""
    try:
        return read_card(registry_of(model).path(model.reference)).version
    except CardError:
        return ""


def answered_items(model: ModelConfig) -> dict[str, list[Item]]:
    """Items of the roles without tasks, as far as the reference has answered."""
    roles = unlabelled_roles(model)
    version = version_in_use(model) if roles else ""
    return {name: judging(model, version, role).items() for name, role in roles.items()}


def asked_items(model: ModelConfig) -> dict[str, list[Item]]:
    """The same before anything is answered: what can be counted and rendered."""
    return {
        name: [
            Item(messages=one.messages, expected="", check="reference", json_schema=one.json_schema)
            for one in judging(model, "", role).conversations
        ]
        for name, role in unlabelled_roles(model).items()
    }


def calibration_for(model: ModelConfig, checkpoint: Checkpoint, version: str) -> CalibrationSet:
    """The model's calibration file, or the conversations that ship with the product: with the reference's
    answers, or, while there are none, the prompts alone. Raises CalibrationError."""
    asked = calibrating(model, version)
    answers = read_answers(asked.journal) if asked is not None and not asked.missing else {}
    if model.calibration is not None:
        by_line = {int(name.removeprefix(OWN)): answer.text for name, answer in answers.items()}
        return read_calibration(model.calibration, checkpoint, by_line)
    assert asked is not None
    if not answers:
        prompts = [one.messages for one in asked.conversations]
        return calibration_of(prompts, "conversations of Tiercel, prompts alone", checkpoint)
    whole = [
        (*one.messages, {"role": "assistant", "content": answers[one.id].text}) for one in asked.conversations
    ]
    return calibration_of(whole, "conversations of Tiercel, answered by the reference", checkpoint)


def is_answered(model: ModelConfig) -> bool:
    """Whether the reference that is there has answered all that calibrates and judges."""
    version = version_in_use(model)
    return bool(version) and not _missing(model, version, to_calibrate=True)


def _missing(model: ModelConfig, version: str, to_calibrate: bool) -> list[tuple[str, Questions]]:
    """What the reference has not answered, once each, and what for."""
    own = calibrating(model, version) if to_calibrate else None
    everything = [("calibrate with", own)] if own is not None else []
    everything += [("judge by", judging(model, version, role)) for role in unlabelled_roles(model).values()]
    once = {asked.journal.path: (purpose, asked) for purpose, asked in everything}
    return [(purpose, asked) for purpose, asked in once.values() if asked.missing]


async def ask_reference(
    model: ModelConfig,
    say: Say,
    engines: Mapping[str, EngineSpec] | None = None,
    *,
    to_calibrate: bool = False,
) -> None:
    """Have the reference answer what roles without tasks are judged by, and ``to_calibrate`` what calibrates
    and ends with a question, as far as it has not yet: on its engine in ``engines`` (by ``model:variant``),
    or on one that is started for it."""
    if not _missing(model, "", to_calibrate):
        return
    registry = registry_of(model, say)
    reference = registry.add_reference(checkpoint_of(model, say))
    if not _missing(model, reference.version, to_calibrate):
        return
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(registry.measuring())
        missing = _missing(model, reference.version, to_calibrate)
        if not missing:  # another process has asked meanwhile
            return
        spec = (engines or {}).get(reference.id)
        if spec is None or spec.directory != registry.path(reference.variant, reference.version):
            spec = await stack.enter_async_context(variant_engine(model, reference, say))
        client = await stack.enter_async_context(EngineClient(spec.url, reference.model))
        for purpose, asked in missing:
            say(asked.told(purpose))
            await answer_all(client, asked.conversations, asked.asking, asked.journal)


@asynccontextmanager
async def variant_engine(model: ModelConfig, card: Card, say: Say) -> AsyncIterator[EngineSpec]:
    """The engine of a variant, such as the reference, alone on the machine and ready inside the block. Raises
    EngineStartError and PlacementError."""
    directory = registry_of(model).path(card.variant, card.version)
    seats = Seats(look(), 1)
    async with seats.take(need_of(card, directory, model.engine)) as placed:
        spec = EngineSpec(
            card=card,
            directory=directory,
            settings=model.engine,
            port=free_port(model.engine.host),
            log=model.variants_dir / ".logs" / f"engine-{card.variant}.log",
            placed=placed,
        )
        async with running(spec, say):
            yield spec
