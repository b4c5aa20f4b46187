"""``tiercel tasks``: what roles were asked, kept with their consent, becomes held-out items."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError
from tqdm import tqdm

from deploy.door import Door
from deploy.models import checkpoint_of
from deploy.reference import Reached, reference_of
from deploy.unlabelled import version_in_use
from gateway.config import Config, ConfigError, ModelConfig, RoleSettings
from gateway.kept.cipher import cipher_of
from gateway.kept.conversation import Asked
from gateway.kept.redact import left
from gateway.kept.store import Given, KeptStore, Question, missing_store, store_url
from quantize.core.checkpoint import CheckpointError
from quantize.core.tokenizer import encode_messages, load_tokenizer
from quantize.evaluate.client import EngineClient
from quantize.evaluate.conversations import without_system
from quantize.evaluate.tasks import Item

Say = Callable[[str], None]
AT_ONCE = 4
"""Requests under way: users of the same engine come first."""
DEFAULT_TOKENS, MOST_TOKENS, LEAST_TOKENS = 256, 1024, 16
"""Of an answer: where the request said nothing, at most, and what must at least fit beside the question."""


@dataclass
class Recorded:
    """Items, and how many conversations became none, by why."""

    items: list[Item] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, why: str) -> None:
        self.skipped[why] = self.skipped.get(why, 0) + 1


def open_kept(config: Config, *, sealed: bool = False) -> KeptStore:
    """The store; ``sealed``: to count and to delete alone, which needs no key. Raises ConfigError and
    StoreError."""
    if (path := missing_store(config)) is not None:
        raise ConfigError(
            f"{path} does not exist: nothing is kept yet; the section kept and roles.ROLE.record switch it on"
        )
    return KeptStore(store_url(config), None if sealed else cipher_of(config))


async def record(config: Config, role: str, most: int | None, door: Door | None, say: Say) -> Recorded:
    """The role's newest ``most`` conversations as items, each with the answer of the reference of the role's
    first model. Answers are kept with what they answer: nothing is asked twice. Raises ConfigError,
    StoreError, EngineStartError, EngineError and PlacementError."""
    store = open_kept(config)
    try:
        model, settings = config.of(config.models_of(role)[0]), config.roles[role]
        recorded = Recorded()
        ids = store.ids("request", role)[-most:] if most is not None else store.ids("request", role)
        if not ids:
            raise ConfigError(f"roles.{role}: nothing is kept of it yet; `tiercel tasks show` says what is")
        found = await asyncio.to_thread(_questions, store, ids, recorded)
        items = await asyncio.to_thread(_fitting, found, model, settings, recorded)
        await _answered(store, items, model, door, say, recorded)
        return recorded
    finally:
        store.close()


def write_items(path: Path, items: Sequence[Item]) -> None:
    """JSON Lines that their owner alone can read; whole, or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)
    with os.fdopen(
        os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8"
    ) as file:
        for item in items:
            line = item.model_dump(mode="json", exclude_defaults=True)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    partial.replace(path)


def _questions(store: KeptStore, ids: Sequence[int], recorded: Recorded) -> list[Question]:
    """Those that can be opened and asked, of equal ones the last."""
    found: dict[str, Question] = {}
    for number in ids:
        question = store.question(number)
        if question is None:
            recorded.skip("cannot be opened")
            continue
        if not left(question.asked.messages[-1]["content"]):
            recorded.skip("had nothing left but what was taken out")
            continue
        asked = question.asked
        same = json.dumps([asked.messages, asked.json_schema, asked.template], sort_keys=True)
        if same in found:
            recorded.skip("are there twice")
        found[same] = question
    return list(found.values())


@dataclass(frozen=True)
class _Fitting:
    """A question as an item without its answer."""

    question: Question
    item: Item


def _fitting(
    questions: Sequence[Question], model: ModelConfig, role: RoleSettings, recorded: Recorded
) -> list[_Fitting]:
    checkpoint = checkpoint_of(model)
    tokenizer = load_tokenizer(checkpoint.path)
    context = model.engine.context(checkpoint.max_model_len, checkpoint.kv_bytes_per_token(2))
    found = []
    for question in questions:
        asked = question.asked
        for messages in _as_templates_take_them(asked):
            try:
                room = context - len(encode_messages(tokenizer, messages, checkpoint.path))
            except CheckpointError:
                continue
            if room < LEAST_TOKENS:
                recorded.skip("are too long for the model's context")
                break
            try:
                found.append(_Fitting(question, _item(asked, messages, role, room)))
            except ValidationError:
                recorded.skip("ask for a schema that cannot be checked")
            break
        else:
            recorded.skip("are nothing for the model's chat template")
    return found


def _as_templates_take_them(asked: Asked) -> Iterator[Sequence[dict[str, str]]]:
    yield asked.messages
    if asked.messages[0]["role"] == "system" and len(asked.messages) > 1:
        yield without_system(asked.messages)


def _item(asked: Asked, messages: Sequence[dict[str, str]], role: RoleSettings, room: int) -> Item:
    most = role.max_tokens or min(asked.max_tokens or DEFAULT_TOKENS, MOST_TOKENS)
    return Item(
        messages=tuple(messages),
        expected="",
        check="reference",
        max_tokens=min(most, room),
        chat_template_kwargs=asked.template or role.chat_template_kwargs or None,
        json_schema=asked.json_schema,
        guided=asked.json_schema is not None,
    )


async def _answered(
    store: KeptStore,
    fitting: Sequence[_Fitting],
    model: ModelConfig,
    door: Door | None,
    say: Say,
    recorded: Recorded,
) -> None:
    """Have those answered that are not yet, and take all into ``recorded``."""
    known = {one.question.id: one.question.given for one in fitting}

    def is_missing(one: _Fitting, version: str) -> bool:
        given = known[one.question.id]
        return given is None or given.reference != _by(version, one.item)

    version = version_in_use(model)
    if not version or any(is_missing(one, version) for one in fitting):
        async with reference_of(model, door, say) as reached:
            missing = [one for one in fitting if is_missing(one, reached.card.version)]
            await _ask(store, missing, reached, known)
    for one in fitting:
        given = known[one.question.id]
        if given is None or not given.text.strip():
            recorded.skip("have an empty answer")
            continue
        recorded.items.append(one.item.model_copy(update={"expected": given.text}))


async def _ask(
    store: KeptStore, missing: Sequence[_Fitting], reached: Reached, known: dict[int, Given | None]
) -> None:
    door = reached.door
    client = EngineClient(
        door.url, reached.model, AT_ONCE, headers=door.headers, verify=not door.local
    )  # fmt: skip
    loop = asyncio.get_running_loop()
    bar = tqdm(total=len(missing), desc="the reference answers", unit="conversation", mininterval=1)
    # Left only when all that was begun is written, whatever ends it.
    with bar, ThreadPoolExecutor(1, "kept") as writing:

        async def ask(one: _Fitting) -> None:
            item = one.item
            schema = item.json_schema if item.guided else None
            text = await client.answer(item.messages, item.max_tokens, schema, item.chat_template_kwargs)
            given = known[one.question.id] = Given(_by(reached.card.version, item), text)
            await loop.run_in_executor(writing, store.give, one.question.id, given)
            bar.update()

        async with client, asyncio.TaskGroup() as group:
            for one in missing:
                group.create_task(ask(one))


def _by(version: str, item: Item) -> str:
    """Who has answered, and in how many tokens."""
    return f"{version} {item.max_tokens} {json.dumps(item.chat_template_kwargs, sort_keys=True)}"
