"""The variants directory: versions that never change, the one in use, and the way back.

variants_dir/
  int8/                      a variant
    3f2a90c1d7e4/            a version, named by the hash of its files: read-only files and card.json
    current -> 3f2a90c1d7e4  the version in use; a link that is replaced in one step
  .measurements/             answers of engines, by variant, version and task hash; .lock is held by the one
                             process that asks engines and writes down what is found out
  .distributions/            figures of weights and activations, by variant and version
  .logs/                     llm-compressor's output
  .locks/<variant>           held, with the process's number in it, while a variant is made or changed
  .partial-<variant>@…/      being made or deleted; never read, removed by the next run

Files that are already on disk (a tokenizer, the base checkpoint, an equal version's weights) are linked,
not stored again. A file that also belongs to somebody else's directory keeps its permissions.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantize.card import (
    CARD_NAME,
    CURRENT,
    VERSION,
    Card,
    CardError,
    read_card,
    variant_directory,
    verify_files,
    write_card,
)
from quantize.core.files import Say, held, held_bytes, locked, point
from quantize.versions import is_proven, usable_version, why_kept

FOUND_OUT = ("evaluation", "speed", "account", "doubts", "gate", "state", "engine_words")
"""Fields of a card that are found out about a version after it was made."""


@dataclass(frozen=True)
class Deleted:
    """What a deletion removed, and the bytes that the disk got back."""

    variant: str
    versions: tuple[str, ...]
    bytes: int

    def __str__(self) -> str:
        many = f"{len(self.versions)} version{'s' if len(self.versions) != 1 else ''}"
        return f"deleted {self.variant} ({many}: {', '.join(self.versions)}); freed {self.bytes / 1e6:.2f} MB"


class VariantsDirectory:
    """The variants of one model in one directory. ``say`` is told what a person might wait for."""

    def __init__(self, directory: Path, model: str, reference: str, say: Say = lambda _text: None) -> None:
        self.directory, self.model, self.reference = directory, model, reference
        self._say = say

    def path(self, variant: str, version: str | None = None) -> Path:
        """Where a version's files lie; the one in use without ``version``. Raises CardError."""
        return variant_directory(self.directory, variant, version)

    def variants(self) -> tuple[str, ...]:
        """Names of all variants, the reference first. Raises CardError at one in an older layout."""
        if not self.directory.is_dir():
            return ()
        found = (path.name for path in self.directory.iterdir() if path.is_dir() and path.name[0] != ".")
        names = [name for name in found if (self.path(name) / CARD_NAME).is_file()]
        return tuple(sorted(names, key=lambda name: (name != self.reference, name)))

    def versions(self, variant: str) -> tuple[str, ...]:
        """Versions of a variant, the oldest first."""
        directory = self.path(variant).parent
        if not directory.is_dir():
            return ()
        names = [
            path.name
            for path in directory.iterdir()
            if VERSION.fullmatch(path.name) and (path / CARD_NAME).is_file()
        ]
        cards = {name: self._read(variant, name) for name in names}
        return tuple(sorted(names, key=lambda name: (card.created if (card := cards[name]) else "", name)))

    def current(self, variant: str) -> str:
        """The version in use. Raises CardError when there is no such variant."""
        name = self.path(variant).name
        if name == CURRENT:
            known = ", ".join(self.variants()) or "none"
            raise CardError(
                f"there is no variant {variant!r} in {self.directory}, known: {known}; "
                "make the variant with `tiercel quantize`"
            )
        return name

    def card(self, variant: str, version: str | None = None) -> Card:
        """The card, after checking that the files beside it are the ones it lists. Raises CardError."""
        directory = self.path(variant, self.current(variant) if version is None else version)
        card = read_card(directory)
        if card.variant != variant or card.model != self.model:
            raise CardError(
                f"{directory} holds {card.model}:{card.variant}, not {self.model}:{variant}; "
                "point variants_dir at this model's variants or make them again"
            )
        verify_files(card, directory)
        return card

    def to_measure(self, variant: str) -> Card:
        """The card of the version in use, for measuring it again.

        Of a card that was edited after it was written, what was found out about the version is dropped, and
        the rest is sealed anew: the engine's own account tells whether that is true. Raises CardError.
        """
        directory = self.path(variant, self.current(variant))
        try:
            read_card(directory)
        except CardError as error:
            card = read_card(directory, even_edited=True)  # raises again what is another matter
            self._say(f"{error}; what it says of them is dropped now")
            fields = Card.model_fields
            blank = {name: fields[name].get_default(call_default_factory=True) for name in FOUND_OUT}
            write_card(card.model_copy(update=blank), directory)
        return self.card(variant)

    def cards(self) -> tuple[Card, ...]:
        """The card in use of every variant, the reference first."""
        return tuple(self.card(variant) for variant in self.variants())

    def update(self, card: Card) -> Card:
        """Write what was found out about a version: evaluation, gate, state. The files stay as they are."""
        directory = self.path(card.variant, card.version)
        if read_card(directory).files != card.files:
            raise CardError(f"{directory}: the new card lists other files; make the variant again")
        write_card(card, directory)
        return card

    def mark_broken(self, card: Card, engine_words: str) -> Card:
        """The engine cannot load this version: it is never served or routed to, and says why.

        Where it is the one in use, the newest version that passed a gate is used again.
        """
        broken = self.update(card.model_copy(update={"state": "broken", "engine_words": engine_words}))
        place, sentence = usable_version(self.directory, card.variant)
        if sentence:
            with self._locked(card.variant):
                point(self.directory / card.variant / CURRENT, place.name)
            self._say(sentence)
        return broken

    def adopt(self, card: Card) -> bool:
        """Use a version that was judged, unless the one in use passed what it did not; whether it is used.

        A variant that did not load is never used in another's place.
        """
        current = self._read(card.variant, self.current(card.variant))
        if current is None or current.version == card.version:
            return True
        if kept := why_kept(current, card):
            self._say(
                f"{card.variant} {card.version} is not put to use: {kept}; {current.version} stays in use "
                f"(`tiercel variants use {card.variant} {card.version}` overrules this)"
            )
            return False
        with self._locked(card.variant):
            point(self.directory / card.variant / CURRENT, card.version)
        self._say(f"{card.variant}: {card.version} is in use now, {current.version} was before")
        return True

    def _point(self, card: Card) -> None:
        """Use a version that was just made or found, unless one is in use that passed a gate."""
        link = self.directory / card.variant / CURRENT
        current = self._read(card.variant, os.readlink(link)) if link.is_symlink() else None
        if current is None or current.version == card.version or not is_proven(current):
            point(link, card.version)
        elif not card.passed >= current.passed or card.state != "ready":
            self._say(
                f"{card.variant} {card.version} is there; {current.version}, which passed, stays in use "
                "until the new one has passed too"
            )
        else:
            point(link, card.version)

    def use(self, variant: str, version: str) -> Card:
        """Point ``current`` at a version: back to an older one, or forth again. Raises CardError."""
        self.current(variant)
        if version not in self.versions(variant):
            known = ", ".join(self.versions(variant))
            raise CardError(f"{variant} has no version {version!r}; known: {known}")
        with self._locked(variant):
            card = self.card(variant, version)
            point(self.directory / variant / CURRENT, version)
        return card

    def delete(self, variant: str, version: str | None = None) -> Deleted:
        """Delete a version, or the whole variant without ``version``; its measurements go with it.

        Raises CardError for the version in use, and for a reference that others were compared with.
        """
        current = self.current(variant)
        gone = self.versions(variant) if version is None else (version,)
        if version is not None and version not in self.versions(variant):
            raise CardError(
                f"{variant} has no version {version!r}; known: {', '.join(self.versions(variant))}"
            )
        if version == current:
            raise CardError(
                f"{variant} {version} is in use; choose another version first "
                f"(`tiercel variants use {variant} …`), or delete the whole variant"
            )
        self._refuse_needed(variant, gone, whole=version is None)
        with self._locked(variant):
            doomed = self.directory / f".partial-{variant}@deleted"
            shutil.rmtree(doomed, ignore_errors=True)
            target = self.directory / variant if version is None else self.path(variant, version)
            target.rename(doomed)
            freed = held_bytes(doomed)
            shutil.rmtree(doomed)
            for name in gone:
                for kept in (".measurements", ".distributions"):
                    for path in self.directory.glob(f"{kept}/{variant}-{name}*"):
                        freed += path.stat().st_size
                        path.unlink()
        return Deleted(variant, gone, freed)

    def _refuse_needed(self, variant: str, gone: tuple[str, ...], whole: bool) -> None:
        for other in self.variants():
            for name in self.versions(other) if other != variant else ():
                if (card := self._read(other, name)) is None:
                    continue
                compared = whole and card.reference == variant and card.evaluation is not None
                if compared or (card.reference == variant and card.parent in gone and not whole):
                    raise CardError(
                        f"{variant} cannot be deleted: {other} {name} was compared with it; "
                        f"delete {other} first"
                    )

    def measurement_path(self, card: Card, tasks_sha256: str) -> Path:
        name = f"{card.variant}-{card.version}-{tasks_sha256[:12]}.json.gz"
        return self.directory / ".measurements" / name

    def measuring(self) -> AbstractAsyncContextManager[None]:
        """One process at a time asks engines here, and writes their answers and the verdicts on them; the
        next one finds them. Not to be entered twice by a process."""
        return held(
            self.directory / ".measurements" / ".lock", f"measuring variants of {self.model}", self._say
        )

    def distributions_path(self, card: Card) -> Path:
        return self.directory / ".distributions" / f"{card.variant}-{card.version}.json"

    @contextmanager
    def _locked(self, variant: str) -> Iterator[None]:
        """One process at a time; what a killed one left of this variant is removed."""
        with locked(self.directory / ".locks" / variant, f"variant {variant}", self._say):
            for leftover in self.directory.glob(f".partial-{variant}@*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield

    def _read(self, variant: str, version: str) -> Card | None:
        """The card of a version, or None where it cannot be read."""
        try:
            return read_card(self.path(variant, version))
        except CardError:
            return None

    def _is_whole(self, variant: str, version: str) -> bool:
        try:
            self.card(variant, version)
        except CardError as error:
            if (self.path(variant, version) / CARD_NAME).exists():
                self._say(f"{error}; it is made again now")
            return False
        return True
