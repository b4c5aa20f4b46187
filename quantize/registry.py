"""The variants directory: versions that never change, the one in use, and the way back.

variants_dir/
  int8/                      a variant
    3f2a90c1d7e4/            a version, named by the hash of its files: read-only files and card.json
    current -> 3f2a90c1d7e4  the version in use; a link that is replaced in one step
  .measurements/             answers of engines, by variant, version and task hash
  .distributions/            figures of weights and activations, by variant and version
  .logs/                     llm-compressor's output
  .locks/<variant>           held, with the process's number in it, while a variant is made or changed
  .partial-<variant>@…/      being made or deleted; never read, removed by the next run

Files that are already on disk (a tokenizer, the base checkpoint, an equal version's weights) are linked,
not stored again. A file that also belongs to somebody else's directory keeps its permissions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantize.card import (
    CARD_NAME,
    CURRENT,
    VERSION,
    Card,
    CardError,
    hash_files,
    read_card,
    sha256_of,
    variant_directory,
    verify_files,
    write_card,
)
from quantize.core.checkpoint import Checkpoint, base_sha256, copy_companions, weight_bytes
from quantize.core.files import Say, held_bytes, link_or_copy, locked, make_read_only, point, share
from quantize.core.modules import Modules, read_modules
from quantize.core.plan import Plan
from quantize.core.resources import Taken, measured
from quantize.core.schemes import kv_scheme, scheme
from quantize.core.targets import Target
from quantize.make.calibration import CalibrationSet
from quantize.make.compress import versions
from quantize.make.variant import compress
from quantize.register.examine import examine
from quantize.versions import is_proven, usable_version, why_kept


@dataclass(frozen=True)
class Deleted:
    """What a deletion removed, and the bytes that the disk got back."""

    variant: str
    versions: tuple[str, ...]
    bytes: int

    def __str__(self) -> str:
        many = f"{len(self.versions)} version{'s' if len(self.versions) != 1 else ''}"
        return f"deleted {self.variant} ({many}: {', '.join(self.versions)}); freed {self.bytes / 1e6:.2f} MB"


class Registry:
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
            raise CardError(f"there is no variant {variant!r} in {self.directory}; known: {known}")
        return name

    def card(self, variant: str, version: str | None = None) -> Card:
        """The card, after checking that the files beside it are the ones it lists. Raises CardError."""
        directory = self.path(variant, version)
        card = read_card(directory)
        if card.variant != variant or card.model != self.model:
            raise CardError(
                f"{directory} holds {card.model}:{card.variant}, not {self.model}:{variant}; "
                "point variants_dir at this model's variants or make them again"
            )
        verify_files(card, directory)
        return card

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

    def distributions_path(self, card: Card) -> Path:
        return self.directory / ".distributions" / f"{card.variant}-{card.version}.json"

    def add_reference(self, checkpoint: Checkpoint) -> Card:
        """Take in the base checkpoint itself: its weights and what goes with them, nothing else.

        An engine prefers some files to those that were read here (``consolidated.safetensors`` and
        ``params.json`` to shards and ``config.json``); they stay where they are.
        """

        def fill(partial: Path) -> dict[str, Any]:
            copy_companions(checkpoint, partial)
            for name in checkpoint.files:
                if not (partial / name).exists():
                    link_or_copy(checkpoint.path / name, partial / name)
            return {
                "scheme": "float16" if checkpoint.serving_dtype == "F16" else "bfloat16",
                "method": "none",
                "weight_bits": 16,
                "module_bits": {},
                "kv_bytes_per_token": checkpoint.kv_bytes_per_token(2),
                "versions": {"tiercel": version("tiercel")},
            }

        base = base_sha256(checkpoint)
        return self._add(self.reference, {"base": base}, fill, checkpoint, base, parent=None)

    def add(
        self,
        checkpoint: Checkpoint,
        variant: str,
        plan: Plan,
        calibration: CalibrationSet | None,
        *,
        make: Callable[[Path], None] | None = None,
        target: str | None = None,
        predicted_kl: float | None = None,
    ) -> Card:
        """Make ``variant`` by ``plan``, or return it if the same inputs made it before.

        ``make`` writes the checkpoint into an empty directory; llm-compressor does where it is not given.
        ``target`` and ``predicted_kl`` are for the card: where the plan was checked to load, and what the
        planner expects of it.
        """
        made_with = {"tiercel": version("tiercel"), **versions()}
        base = base_sha256(checkpoint)
        inputs = {
            "base": base,
            "plan": plan.model_dump(mode="json"),
            "calibration": calibration.description.sha256 if calibration else None,
            "versions": made_with,
        }
        modules = read_modules(checkpoint)

        def fill(partial: Path) -> dict[str, Any]:
            taken: Taken | None = None
            if make is not None:
                make(partial)
            else:
                log = self.directory / ".logs" / f"{variant}.log"
                with measured() as taken:
                    compress(checkpoint, modules, plan, calibration, partial, log, variant)
                self._say(f"{variant}: made in {taken.seconds:.0f} s")
            return _described(plan, modules, checkpoint) | {
                "making": asdict(taken) if taken else None,
                "bits_per_weight": plan.bits_per_weight(modules),
                "calibration": calibration.description if calibration else None,
                "versions": made_with,
                "target": target,
                "predicted_kl": predicted_kl,
            }

        return self._add(variant, inputs, fill, checkpoint, base, parent=self._reference_version(base))

    def register(
        self, directory: Path, variant: str, checkpoint: Checkpoint, where: Target | None = None
    ) -> Card:
        """Take in a quantized checkpoint that was made elsewhere, without changing a byte of it.

        compressed-tensors, AWQ, GPTQ and AutoRound formats are read; ``checkpoint`` is the base model that
        it was made from. What was supplied or noticed is in the card's notes. Raises CheckpointError, for an
        order of columns that ``where`` does not load as well.
        """
        if variant == self.reference:
            raise CardError(f"{variant!r} is the reference's name; register {directory} under another one")
        modules = read_modules(checkpoint)
        found = examine(directory, checkpoint, modules, where)
        base = base_sha256(checkpoint)

        def fill(partial: Path) -> dict[str, Any]:
            for written, text in found.written.items():
                (partial / written).write_text(text, encoding="utf-8")
            for source, name in found.files:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                if not (partial / name).exists():
                    link_or_copy(source, partial / name)
            return _described(found.plan, modules, checkpoint) | {
                "origin": "registered",
                "bits_per_weight": found.bits_per_weight,
                "versions": {"tiercel": version("tiercel")},
                "notes": found.notes,
            }

        contents = {name.as_posix(): sha256_of(path) for path, name in found.files}
        inputs = {"base": base, "registered": contents}
        return self._add(variant, inputs, fill, checkpoint, base, parent=self._reference_version(base))

    def _add(
        self,
        variant: str,
        inputs: Mapping[str, object],
        fill: Callable[[Path], dict[str, Any]],
        checkpoint: Checkpoint,
        base: str,
        parent: str | None,
    ) -> Card:
        digest = _digest(inputs)
        self.path(variant)  # refuses bad names and the older layout before any work
        with self._locked(variant):
            if (known := self._made_from(variant, digest)) is not None:
                self._point(known)
                return known
            partial = Path(tempfile.mkdtemp(prefix=f".partial-{variant}@", dir=self.directory))
            try:
                card = Card.model_validate(
                    {
                        "model": self.model,
                        "variant": variant,
                        "reference": self.reference,
                        "max_model_len": checkpoint.max_model_len,
                        "base_sha256": base,
                        "parent": parent,
                        "created": datetime.now(UTC).isoformat(timespec="microseconds"),
                        "inputs_sha256": digest,
                        **fill(partial),
                        "weight_bytes": weight_bytes(partial),
                        "files": hash_files(partial),
                    }
                )
                return self._keep(card, partial)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise

    def _keep(self, card: Card, partial: Path) -> Card:
        """Move a finished directory to its place, and use it. Equal files were there before: keep those."""
        place = self.path(card.variant, card.version)
        if self._is_whole(card.variant, card.version):
            shutil.rmtree(partial)
            known = read_card(place)
            found_out = (
                "created",
                "evaluation",
                "speed",
                "gate",
                "state",
                "engine_words",
                "account",
                "doubts",
            )
            card = self.update(card.model_copy(update={name: getattr(known, name) for name in found_out}))
        else:
            share(partial, card.files, dict(self._files()))
            make_read_only(partial)
            write_card(card, partial)
            partial.chmod(0o755)
            place.parent.mkdir(exist_ok=True)
            if place.exists():  # damaged
                place.rename(self.directory / f".partial-{card.variant}@{card.version}")
            partial.rename(place)
        self._point(card)
        return card

    def _files(self) -> Iterator[tuple[str, Path]]:
        """SHA-256 and place of every file of every version."""
        for variant in self.variants():
            for name in self.versions(variant):
                directory = self.path(variant, name)
                card = self._read(variant, name)
                for file, digest in card.files.items() if card else ():
                    if (directory / file).is_file():
                        yield digest, directory / file

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

    def _reference_version(self, base: str) -> str | None:
        """The reference's version that is this base checkpoint, in use or not; None before it is taken in."""
        for name in reversed(self.versions(self.reference)):
            if (card := self._read(self.reference, name)) and card.base_sha256 == base:
                return name
        return None

    def _made_from(self, variant: str, inputs: str) -> Card | None:
        """A whole version that was made from the same inputs."""
        for name in reversed(self.versions(variant)):
            known = self._read(variant, name)
            if known is not None and known.inputs_sha256 == inputs and self._is_whole(variant, name):
                return known
        return None

    def _is_whole(self, variant: str, version: str) -> bool:
        try:
            self.card(variant, version)
        except CardError as error:
            if (self.path(variant, version) / CARD_NAME).exists():
                self._say(f"{error}; it is made again now")
            return False
        return True


def _described(plan: Plan, modules: Modules, checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of a card that follow from a plan."""
    bits = {
        member.name: scheme(plan.groups[group.name]).weight_bits
        for group in modules
        for member in group.members
    }
    kv = kv_scheme(plan.kv)
    text = checkpoint.text_config
    heads = text.get("num_key_value_heads") or text["num_attention_heads"]
    layers = text["num_hidden_layers"]
    return {
        "scheme": plan.describe(),
        "schemes": dict(plan.groups),
        "method": plan.method,
        "methods": dict(plan.methods),
        "kv": plan.kv,
        "weight_bits": min(bits.values()),
        "module_bits": bits,
        "kv_bytes_per_token": kv.bytes_per_token(layers, heads, checkpoint.head_dim),
    }


def _digest(listing: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()
