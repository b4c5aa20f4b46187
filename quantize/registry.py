"""The variants directory: making variants in it atomically, and finding them again.

variants_dir/
  bf16/ int8/ …            one directory per variant: checkpoint files and card.json
  .measurements/           answers of engines, by variant version and task hash
  .logs/                   llm-compressor's output
  .partial-<variant>-…/    being made; never read, removed by the next run
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from quantize.calibration import CalibrationSet
from quantize.card import Card, CardError, hash_files, read_card, sha256_of, verify_files, write_card
from quantize.checkpoint import Checkpoint, weight_bytes, weight_files
from quantize.compress import compress, versions
from quantize.modules import read_modules
from quantize.plan import Plan
from quantize.schemes import kv_scheme, scheme


class Registry:
    """The variants of one model in one directory."""

    def __init__(self, directory: Path, model: str, reference: str) -> None:
        self.directory, self.model, self.reference = directory, model, reference

    def path(self, variant: str) -> Path:
        return self.directory / variant

    def card(self, variant: str) -> Card:
        """The card, after checking that the files beside it are the ones it lists. Raises CardError."""
        card = read_card(self.path(variant))
        if card.variant != variant or card.model != self.model:
            raise CardError(
                f"{self.path(variant)} holds {card.model}:{card.variant}, not {self.model}:{variant}; "
                "point variants_dir at this model's variants or make them again"
            )
        verify_files(card, self.path(variant))
        return card

    def measurement_path(self, card: Card, tasks_sha256: str) -> Path:
        name = f"{card.variant}-{card.version}-{tasks_sha256[:12]}.json.gz"
        return self.directory / ".measurements" / name

    def add_reference(self, checkpoint: Checkpoint) -> Card:
        """Register the base checkpoint itself; its files are hard-linked where the disk allows it."""

        def fill(partial: Path) -> dict[str, int]:
            for source in sorted(path for path in checkpoint.path.iterdir() if path.is_file()):
                try:
                    os.link(source.resolve(), partial / source.name)
                except OSError:
                    shutil.copy2(source, partial / source.name)
            return {}

        return self._add(
            self.reference,
            inputs=_digest({"base": base_sha256(checkpoint)}),
            fill=fill,
            describe=lambda _bits: {
                "scheme": str(checkpoint.config.get("dtype", "bfloat16")),
                "method": "none",
                "weight_bits": 16,
                "module_bits": {},
                "kv_bytes_per_token": checkpoint.kv_bytes_per_token(2),
                "versions": {"tiercel": version("tiercel")},
            },
            checkpoint=checkpoint,
        )

    def add(
        self, checkpoint: Checkpoint, variant: str, plan: Plan, calibration: CalibrationSet | None
    ) -> Card:
        """Make ``variant`` by ``plan``, or return it if the same inputs made it before."""
        made_with = {"tiercel": version("tiercel"), **versions()}
        inputs = _digest(
            {
                "base": base_sha256(checkpoint),
                "plan": plan.model_dump(mode="json"),
                "calibration": calibration.description.sha256 if calibration else None,
                "versions": made_with,
            }
        )
        modules = read_modules(checkpoint)

        def fill(partial: Path) -> dict[str, int]:
            log = self.directory / ".logs" / f"{variant}.log"
            compress(checkpoint, modules, plan, calibration, partial, log, variant)
            return {
                member.name: scheme(plan.groups[group.name]).weight_bits
                for group in modules
                for member in group.members
            }

        return self._add(
            variant,
            inputs=inputs,
            fill=fill,
            describe=lambda bits: {
                "scheme": plan.describe(),
                "method": plan.method,
                "weight_bits": min(bits.values()),
                "kv_cache_dtype": plan.kv,
                "module_bits": bits,
                "kv_bytes_per_token": checkpoint.kv_bytes_per_token(kv_scheme(plan.kv).bits // 8),
                "calibration": calibration.description if calibration else None,
                "versions": made_with,
            },
            checkpoint=checkpoint,
        )

    def _add(
        self,
        variant: str,
        inputs: str,
        fill: Callable[[Path], dict[str, int]],
        describe: Callable[[dict[str, int]], dict[str, object]],
        checkpoint: Checkpoint,
    ) -> Card:
        if (known := self._made_from(variant, inputs)) is not None:
            return known
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(f".partial-{variant}-*"):
            shutil.rmtree(leftover)
        partial = Path(tempfile.mkdtemp(prefix=f".partial-{variant}-", dir=self.directory))
        try:
            description = describe(fill(partial))
            card = Card.model_validate(
                {
                    "model": self.model,
                    "variant": variant,
                    "reference": self.reference,
                    "weight_bytes": weight_bytes(partial),
                    "max_model_len": checkpoint.max_model_len,
                    "created": datetime.now(UTC).isoformat(timespec="seconds"),
                    "inputs_sha256": inputs,
                    "files": hash_files(partial),
                    **description,
                }
            )
            write_card(card, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.path(variant).exists():
            shutil.rmtree(self.path(variant))
        partial.rename(self.path(variant))
        return card

    def _made_from(self, variant: str, inputs: str) -> Card | None:
        """The existing variant if it is whole and was made from the same inputs."""
        try:
            card = self.card(variant)
        except CardError:
            return None
        return card if card.inputs_sha256 == inputs else None


def base_sha256(checkpoint: Checkpoint) -> str:
    names = [*weight_files(checkpoint.path), checkpoint.path / "config.json"]
    names += sorted(checkpoint.path.glob("tokenizer*")) + sorted(checkpoint.path.glob("chat_template*"))
    return _digest({path.name: sha256_of(path) for path in names})


def _digest(listing: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()
