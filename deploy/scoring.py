"""``tiercel watch score``: answers that wait are put before the reference, which is started for them.

The examination is the live watch's, and so is what follows: outcomes go into the watch's store, and whichever
gateway folds them acts. An answer leaves the store before its outcomes are written: whatever is killed,
nothing counts twice, and at most what was under way is lost.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import aiohttp
import msgspec
from tqdm import tqdm

from deploy.door import Door
from deploy.recording import open_kept
from deploy.reference import Reached, reference_of
from gateway.cards import load_cards
from gateway.config import Config, ConfigError, parts_of
from gateway.kept.store import KeptStore, missing_store
from gateway.quality.cells import Cell, CellKey, Outcome
from gateway.quality.examine import Tools, examine
from gateway.quality.examiner import UnansweredError
from gateway.quality.inquiry import LONGEST_ANSWER
from gateway.quality.rates import Watched
from gateway.quality.records import Findings, Regenerate, Result, Score
from gateway.quality.store import Store
from gateway.quality.watch import store_url
from quantize.evaluate.client import EngineError

Say = Callable[[str], None]
AT_ONCE = 4
WAITS = "what was not scored waits for the next `tiercel watch score`"


@dataclass
class Tally:
    """What became of a variant's answers in a role."""

    scored: int = 0
    disputed: int = 0
    regenerated: int = 0
    otherwise: int = 0
    """Of those regenerated: the reference says something else."""
    unanswered: int = 0
    """The reference could not be asked about it, or its score could not be read."""


@dataclass
class Scores:
    """By variant and role."""

    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    replaced: int = 0
    """Answers of versions that are served no more, or of roles and variants that are gone."""
    damaged: int = 0
    """They could not be opened."""

    def of(self, key: CellKey) -> Tally:
        return self.tallies.setdefault((key.variant, key.role), Tally())

    def told(self) -> Iterator[str]:
        """A sentence each."""
        for (variant, role), one in self.tallies.items():
            again = f", {one.otherwise} of {one.regenerated} answered otherwise" if one.regenerated else ""
            failed = f"; {one.unanswered} could not be scored" if one.unanswered else ""
            yield f"{variant} as {role}: {one.disputed} of {one.scored} answers disputed{again}{failed}"
        if self.replaced:
            yield f"{self.replaced} answers were dropped: of versions that are served no more"
        if self.damaged:
            yield f"{self.damaged} answers were dropped: they cannot be opened"


async def score(config: Config, door: Door | None, say: Say) -> Scores:
    """Score what waits, one model after another. Raises ConfigError, StoreError, CardError, EngineError,
    EngineStartError and PlacementError; what was scored by then is in the watch's store."""
    if config.watch.reference != "batch" or not config.watch.enabled:
        raise ConfigError(
            f"watch.reference: is {config.watch.reference}, and nothing waits; set it to batch to have "
            "answers kept until the reference is started for them"
        )
    found = Scores()
    if missing_store(config) is not None:
        return found
    store = open_kept(config)
    try:
        watched = Watched.of(config, load_cards(config))
        waiting = await asyncio.to_thread(_waiting, store, watched, found)
        for name in config.models:
            mine = [one for one in waiting if parts_of(one.key.variant)[0] == name]
            if mine:
                async with reference_of(config.of(name), door, say) as reached:
                    await _Scoring(config, store, watched, reached, found).run(mine)
    finally:
        store.close()
    return found


@dataclass(frozen=True)
class _Waiting:
    """An answer that waits, by its number in the store."""

    id: int
    key: CellKey
    probation: bool
    record: bytes = field(repr=False)


def _waiting(store: KeptStore, watched: Watched, found: Scores) -> list[_Waiting]:
    """What can be scored; everything else is dropped and counted."""
    waiting = []
    for number in store.ids("answer"):
        row = store.answer(number)
        if row is None:
            found.damaged += store.take(number)
            continue
        about = row.about
        key = watched.keys.get((about.variant, about.role))
        if key is None or key.version != about.version:
            found.replaced += store.take(number)
            continue
        waiting.append(_Waiting(number, key, about.probation, row.data))
    return waiting


class _Scoring:
    """One model's answers, by its reference."""

    def __init__(
        self, config: Config, store: KeptStore, watched: Watched, reached: Reached, found: Scores
    ) -> None:
        self._store, self._watched, self._reached, self._found = store, watched, reached, found
        self._timeout_s = config.watch.timeout_s
        self._outcomes = Store(store_url(config), f"score-{uuid.uuid4().hex[:12]}")
        self._cells: dict[CellKey, Cell] = dict(self._outcomes.cells())
        """As they will be when what was found here is folded: what is suspected is known at once."""
        self._session: aiohttp.ClientSession | None = None
        self._writing = ThreadPoolExecutor(1, "scores")

    async def run(self, waiting: Sequence[_Waiting]) -> None:
        door = self._reached.door
        connector = aiohttp.TCPConnector(limit=0, force_close=True, ssl=not door.local)
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        slots = asyncio.Semaphore(AT_ONCE)
        try:
            async with aiohttp.ClientSession(
                connector=connector, timeout=timeout, headers=door.headers
            ) as self._session:
                with tqdm(
                    total=len(waiting), desc="the reference scores", unit="answer", mininterval=1
                ) as bar:

                    async def one(answer: _Waiting) -> None:
                        async with slots:
                            await self._score(answer)
                        bar.update()

                    async with asyncio.TaskGroup() as group:
                        for answer in waiting:
                            group.create_task(one(answer))
        finally:
            self._writing.shutdown()  # with what was begun
            self._outcomes.close()

    async def _score(self, answer: _Waiting) -> None:
        tally, reference = self._found.of(answer.key), self._reached.card.id
        notes = []
        try:
            scored = await self._examined(Score(reference), answer)
            notes += scored.notes
            tally.scored += 1
            tally.disputed += scored.compared is Result.DISPUTED
            comparable = scored.compared is not Result.INCOMPARABLE
            if comparable and not answer.probation and self._suspected(answer.key):
                again = await self._examined(Regenerate(reference), answer)
                notes += again.notes
                tally.regenerated += bool(again.notes)
                tally.otherwise += any(note.bad for note in again.notes)
        except UnansweredError:
            tally.unanswered += not notes
        now = time.time()
        outcomes = [
            Outcome(answer.key, note.check, note.bad, now, note.value, answer.probation)
            for note in notes
            if not answer.probation or note.check == "shadow"
        ]
        loop = asyncio.get_running_loop()
        if await loop.run_in_executor(self._writing, self._settle, answer.id, outcomes):
            self._fold(outcomes)

    def _settle(self, number: int, outcomes: Sequence[Outcome]) -> bool:
        """Whether the answer was still there, and its outcomes count."""
        if not self._store.take(number):
            return False
        self._outcomes.append(outcomes)
        return True

    async def _examined(self, task: Score | Regenerate, answer: _Waiting) -> Findings:
        return await examine(task, answer.record, Tools(), self._ask)

    async def _ask(self, variant: str, path: str, body: bytes) -> bytes:
        """Raises UnansweredError for what the reference refuses, and EngineError where it is gone."""
        assert self._session
        url = self._reached.door.url + path
        whole = b'%b,"model":%b}' % (body[:-1], msgspec.json.encode(self._reached.model))
        try:
            headers = {"content-type": "application/json"}
            async with self._session.post(url, data=whole, headers=headers) as response:
                raw = await response.content.read(LONGEST_ANSWER + 1)
                while len(raw) <= LONGEST_ANSWER and (more := await response.content.read(LONGEST_ANSWER)):
                    raw += more
        except TimeoutError:
            raise UnansweredError(f"{variant}{path} gave no answer in time") from None
        except (aiohttp.ClientError, OSError) as error:
            raise EngineError(f"{url}: {type(error).__name__}: {error}; {WAITS}") from None
        if response.status >= 500:
            raise EngineError(f"{url} answered {response.status}; {WAITS}")
        if response.status != 200 or len(raw) > LONGEST_ANSWER:
            raise UnansweredError(f"{variant}{path} answered with status {response.status}")
        return raw

    def _suspected(self, key: CellKey) -> bool:
        """Whether a check has seen enough to ask for another one's opinion."""
        cell, policy = self._cells.get(key), self._watched.policies[key]
        return cell is not None and bool(cell.warned(policy))

    def _fold(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            cell = self._cells.setdefault(outcome.key, Cell(key=outcome.key))
            for _ in cell.fold(outcome, self._watched.policies[outcome.key], may_demote=False):
                pass
