"""Ready-made parts of variants, and putting any plan together from them.

llm-compressor quantizes the whole model once per (scheme, method), uniformly; the results are
parts. Any mixture of them is then a matter of copying bytes: a group's tensors come from the part that
its choice names. So a search over plans costs no quantization at all, and one plan can take each group
from the method that served it best.

parts_dir/
  <scheme>-<method>-<key>/   a compressed-tensors checkpoint; the key is of everything that decides it
  .partial-…/                being made; removed by the next run

Parts fit together when their methods have the same transforms, and these depend on the calibration data
alone. AWQ's scales depend on the scheme as well, so its parts are only good for uniform plans.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quantize.core.checkpoint import Checkpoint, base_sha256, copy_companions
from quantize.core.methods import MethodError, parse_method
from quantize.core.modules import Group, Modules
from quantize.core.plan import Plan
from quantize.core.quantization_config import pattern
from quantize.core.schemes import kv_scheme, scheme
from quantize.core.tensors import Part, read_parts, write_tensors
from quantize.make.calibration import CalibrationSet
from quantize.make.compress import compress, versions

KV_SCALES = (".k_scale", ".v_scale")


class PartStore:
    """The parts for one checkpoint and one calibration set, made when first asked for."""

    def __init__(
        self,
        directory: Path,
        checkpoint: Checkpoint,
        modules: Modules,
        calibration: CalibrationSet | None,
    ) -> None:
        self.directory, self.checkpoint, self.modules = directory, checkpoint, modules
        self.calibration = calibration
        self._base = base_sha256(checkpoint)
        self._index: dict[Path, dict[str, Part]] = {}

    def part(self, scheme_name: str, method_name: str, groups: Iterable[Group] | None = None) -> Path:
        """The uniform checkpoint of a scheme by a method; ``groups`` limits which modules are quantized.

        ``bf16`` with a method without transforms is the checkpoint itself.
        """
        chosen = {group.name for group in (self.modules if groups is None else groups)}
        method = parse_method(method_name)
        if scheme_name == "bf16" and not method.transforms:
            return self.checkpoint.path
        if scheme_name == "bf16":
            method_name = "+".join((*method.transforms, "rtn"))
        plan = Plan(
            groups={group.name: scheme_name if group.name in chosen else "bf16" for group in self.modules},
            method=method_name,
        )
        return self._made(plan, f"{scheme_name}-{method_name}")

    def kv_part(self, kv: str, transforms: tuple[str, ...]) -> Path:
        """The unquantized weights with calibrated scales of the KV cache."""
        plan = Plan(
            groups={group.name: "bf16" for group in self.modules},
            kv=kv,
            method="+".join((*transforms, "rtn")),
        )
        return self._made(plan, f"kv-{kv}-{plan.method}")

    def _made(self, plan: Plan, label: str) -> Path:
        decides = {
            "base": self._base,
            "plan": plan.model_dump(mode="json", exclude={"tuned"}),
            "calibration": self.calibration.description.sha256 if self.calibration else None,
            "versions": versions(),
        }
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        out = self.directory / f"{label}-{key}"
        if out.is_dir():
            return out
        partial = self.directory / f".partial-{out.name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        log = self.directory / ".logs" / f"{out.name}.log"
        try:
            compress(self.checkpoint, self.modules, plan, self.calibration, partial, log, label)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.rename(out)
        return out

    def assemble(self, plan: Plan, out: Path) -> None:
        """Write the checkpoint of ``plan`` into ``out``: tensors, configuration, tokenizer.

        Raises MethodError when the parts of the plan's methods do not fit together.
        """
        transforms = self._transforms(plan)
        only = {(name, plan.method_of(group)) for group, name in plan.groups.items()}
        base = self.part(*only.pop()) if len(only) == 1 else self.part("bf16", "+".join((*transforms, "rtn")))
        tensors = dict(self.tensors(base))
        quantized: dict[str, list[Group]] = {}
        settings: dict[str, dict[str, Any]] = {}
        for group in self.modules:
            name = plan.groups[group.name]
            if scheme(name).weights is None:
                continue
            source = self.part(name, plan.method_of(group.name))
            quantized.setdefault(name, []).append(group)
            settings.setdefault(name, _first_group(source))
            theirs = self.tensors(source)
            for member in group.members:
                tensors.pop(f"{member.name}.weight", None)
                prefix = member.name + "."
                tensors |= {key: part for key, part in theirs.items() if key.startswith(prefix)}
        kv_arguments = kv_scheme(plan.kv).arguments()
        if kv_arguments is not None:
            if "awq" in transforms:
                raise MethodError("AWQ and a calibrated KV cache are made in one pass, not assembled")
            theirs = self.tensors(self.kv_part(plan.kv, transforms))
            tensors |= {key: part for key, part in theirs.items() if key.endswith(KV_SCALES)}
        out.mkdir(parents=True, exist_ok=True)
        write_tensors(tensors, out / "model.safetensors", self._kept_dtypes(tensors))
        copy_companions(self.checkpoint, out)
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        config.pop("quantization_config", None)
        if quantized or kv_arguments is not None:
            config["quantization_config"] = self._quantization_config(quantized, settings, kv_arguments)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _kept_dtypes(self, tensors: Mapping[str, Part]) -> dict[str, str]:
        """What the checkpoint's own tensors are written in, where that is not what they are stored in."""
        known = self.checkpoint.tensors
        return {
            name: self.checkpoint.kept(name, known[name]).dtype
            for name, part in tensors.items()
            if name in known and known[name].dtype == part.dtype
        }

    def _transforms(self, plan: Plan) -> tuple[str, ...]:
        names = {plan.method_of(g.name) for g in self.modules if scheme(plan.groups[g.name]).weights}
        found = {parse_method(name).transforms for name in names} or {parse_method(plan.method).transforms}
        if len(found) > 1:
            raise MethodError(f"parts of methods {', '.join(sorted(names))} rewrite the model differently")
        (transforms,) = found
        mixed = len({(plan.groups[g.name], plan.method_of(g.name)) for g in self.modules}) > 1
        if "awq" in transforms and mixed:
            raise MethodError("AWQ's scales belong to one scheme: a plan with several cannot be assembled")
        return transforms

    def _quantization_config(
        self,
        quantized: Mapping[str, list[Group]],
        settings: Mapping[str, dict[str, Any]],
        kv_arguments: dict[str, Any] | None,
    ) -> dict[str, Any]:
        groups = {
            f"group_{number}": settings[name] | {"targets": [pattern(group) for group in members]}
            for number, (name, members) in enumerate(quantized.items())
        }
        formats = {group["format"] for group in groups.values()}
        named = {group.name for members in quantized.values() for group in members}
        ignore = [m.name for group in self.modules if group.name not in named for m in group.members]
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": "mixed-precision" if len(formats) > 1 else next(iter(formats), "dense"),
            "config_groups": groups,
            "ignore": [*ignore, "lm_head"],
            "kv_cache_scheme": kv_arguments,
        }

    def tensors(self, directory: Path) -> Mapping[str, Part]:
        """Where every tensor of a part lies."""
        if directory not in self._index:
            self._index[directory] = read_parts(directory)
        return self._index[directory]


def _first_group(directory: Path) -> dict[str, Any]:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    settings: dict[str, Any] = next(iter(config["config_groups"].values()))
    return {"format": config["format"], **settings}
