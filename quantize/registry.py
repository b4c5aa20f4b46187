"""Takes variants into the variants directory: the reference, what is made here, what was made elsewhere."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantize.card import ADAPTER, Card, CardError, Training, hash_files, read_card, write_card
from quantize.core.checkpoint import Checkpoint, base_sha256, copy_companions, weight_bytes
from quantize.core.files import link_or_copy, make_read_only, sha256_of, share
from quantize.core.modules import Modules, read_modules
from quantize.core.plan import Plan
from quantize.core.resources import Taken, measured
from quantize.core.schemes import kv_scheme, scheme
from quantize.core.targets import Target
from quantize.make.calibration import CalibrationSet
from quantize.make.compress import versions
from quantize.make.parts import NUMERICS
from quantize.make.variant import compress
from quantize.register.carried import (
    CARRIED,
    SCALED,
    Carrying,
    adapter_bytes,
    examine_adapter,
    write_carried,
)
from quantize.register.examine import examine
from quantize.variants_dir import FOUND_OUT, VariantsDirectory


class Registry(VariantsDirectory):
    """The variants of one model in one directory, which takes in more."""

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

    def missing(
        self, checkpoint: Checkpoint, plans: Mapping[str, Plan], calibration: CalibrationSet | None
    ) -> dict[str, Plan]:
        """Those of ``plans``, by variant, that are still to be made; files are not compared with cards."""
        base = base_sha256(checkpoint)
        return {
            name: plan
            for name, plan in plans.items()
            if self._from(name, _digest(_inputs(base, plan, calibration))) is None
        }

    def has_reference(self, checkpoint: Checkpoint) -> bool:
        """Whether this base checkpoint was taken in before."""
        return self._reference_version(base_sha256(checkpoint)) is not None

    def add(
        self,
        checkpoint: Checkpoint,
        variant: str,
        plan: Plan,
        calibration: CalibrationSet | None,
        *,
        make: Callable[[Path], Training | None] | None = None,
        target: str | None = None,
        predicted_kl: float | None = None,
        decides: Mapping[str, object] | None = None,
    ) -> Card:
        """Make ``variant`` by ``plan``, or return it if the same inputs made it before.

        ``make`` writes the checkpoint into an empty directory; llm-compressor does where it is not given.
        ``target`` and ``predicted_kl`` are for the card: where the plan was checked to load, and what the
        planner expects of it. What ``make`` returns is said of training in the card, whose numbers follow
        from ``decides`` as well.
        """
        base = base_sha256(checkpoint)
        inputs = _inputs(base, plan, calibration)
        if decides is not None:
            inputs["trained"] = dict(decides)
        modules = read_modules(checkpoint).holding(plan.groups)

        def fill(partial: Path) -> dict[str, Any]:
            taken: Taken | None = None
            training: Training | None = None
            if make is not None:
                training = make(partial)
            else:
                log = self.directory / ".logs" / f"{variant}.log"
                with measured() as taken:
                    compress(checkpoint, modules, plan, calibration, partial, log, variant)
                self._say(f"{variant}: made in {taken.seconds:.0f} s")
            return _described(plan, modules, checkpoint) | {
                "making": asdict(taken) if taken else None,
                "bits_per_weight": plan.bits_per_weight(modules),
                "calibration": calibration.description if calibration else None,
                "versions": inputs["versions"],
                "target": target,
                "predicted_kl": predicted_kl,
                "training": training,
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

    def carry(self, variant: str, asked: Carrying) -> Card:
        """Take in a quantized variant of an adapter's base with the adapter on it, of this registry's model,
        which is the merged one. Raises TrainError for an adapter that does not belong there."""
        if variant == self.reference:
            raise CardError(f"{variant!r} is the reference's name; carry {asked.adapter} under another one")
        carried, carrier = examine_adapter(asked), asked.carrier

        def fill(partial: Path) -> dict[str, Any]:
            for name in carrier.files:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(asked.directory / name, partial / name)
            write_carried(asked, partial / ADAPTER)
            described = carrier.model_dump(include=set(CARRIED)) | {"adapter": carried}
            if asked.scales is not None:
                described["notes"] = (*carrier.notes, SCALED)
            return described

        inputs = {
            "base": base_sha256(asked.merged),
            "carrier": carrier.files,
            "adapter": carried.sha256,
            "scaled": asked.scales is not None,
        }
        return self.take_in(variant, inputs, fill, asked.merged)

    def take_in(
        self,
        variant: str,
        inputs: Mapping[str, object],
        fill: Callable[[Path], dict[str, Any]],
        checkpoint: Checkpoint,
    ) -> Card:
        """Take in files that others make of ``checkpoint``: ``fill`` writes them into an empty directory and
        returns what the card says of them. What the same ``inputs`` made before is returned."""
        base = base_sha256(checkpoint)
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
            if (known := self._from(variant, digest, whole=True)) is not None:
                self._point(known)
                return known
            partial = Path(tempfile.mkdtemp(prefix=f".partial-{variant}@", dir=self.directory))
            try:
                made = fill(partial)
                if "weight_bytes" not in made:
                    made["weight_bytes"] = weight_bytes(partial) + adapter_bytes(partial / ADAPTER)
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
                        **made,
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
            kept = {name: getattr(known, name) for name in ("created", *FOUND_OUT)}
            card = self.update(card.model_copy(update=kept))
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

    def _reference_version(self, base: str) -> str | None:
        """The reference's version that is this base checkpoint, in use or not; None before it is taken in."""
        for name in reversed(self.versions(self.reference)):
            if (card := self._read(self.reference, name)) and card.base_sha256 == base:
                return name
        return None

    def _from(self, variant: str, inputs: str, whole: bool = False) -> Card | None:
        """The newest version that was made from the inputs of this digest; with ``whole``, one whose files
        are those that its card lists."""
        for name in reversed(self.versions(variant)):
            known = self._read(variant, name)
            if (
                known is not None
                and known.inputs_sha256 == inputs
                and (not whole or self._is_whole(variant, name))
            ):
                return known
        return None


def _inputs(base: str, plan: Plan, calibration: CalibrationSet | None) -> dict[str, Any]:
    """What decides the files of a variant that is made here."""
    return {
        "base": base,
        "plan": plan.model_dump(mode="json"),
        "calibration": calibration.description.sha256 if calibration else None,
        "numerics": NUMERICS,
        "versions": {"tiercel": version("tiercel"), **versions()},
    }


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
