"""Ready-made parts of variants, and putting any plan together from them.

A part is one module group at one scheme by one method, in a file of its own. Any mixture is then a
directory of hard links and an index, so a search over plans costs no quantization and no disk at all.

directory/
  <scheme>-<method>-<key>/<group>.safetensors    a part; the key is of everything that decides it
  kept-<transforms>-<key>/kept.safetensors       embeddings, norms, head, biases, as a variant stores them
  kv-<scheme>-…-<key>/kv.safetensors             scales of the KV cache
  smooth-<key>/<block>.safetensors               smoothing scales (:mod:`quantize.make.smooth`)
  ordered-<plan>-<key>/<group>.safetensors       a group of one plan, behind those before it (asymmetric.py)
  massive-<key>/blocks.json                      blocks that write a massive activation, and by how much
  .lock                                          held while parts are made

Finished files stay when a run is killed; the next one makes what is missing. Parts fit together when their
methods have the same transforms, and these depend on the calibration data alone. AWQ's scales depend on the
scheme as well, so its parts are only good for uniform plans.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.core.architectures import architecture
from quantize.core.checkpoint import Checkpoint, base_sha256, copy_companions
from quantize.core.dequantize import read_tensor
from quantize.core.files import READ_ONLY, link_or_copy, locked, write_whole
from quantize.core.methods import SMOOTH, MethodError, parse_method
from quantize.core.modules import HEAD, Group, Modules
from quantize.core.plan import Plan
from quantize.core.quantization_config import quantization_config
from quantize.core.schemes import kv_scheme, scheme
from quantize.core.tensors import Part, read_file_parts, read_parts, write_shards, write_tensors
from quantize.core.weights import INDEX
from quantize.make.asymmetric import as_made, asymmetric_groups, make_in_order
from quantize.make.calibration import CalibrationSet
from quantize.make.compress import compress_whole
from quantize.make.kv_scales import kv_scales
from quantize.make.massive import massive_blocks
from quantize.make.smooth import Scales, ScaleStore, folded, save_whole
from quantize.make.streaming import Choice, QuantizeError, make_parts, needs_data, smoothed, streams

if TYPE_CHECKING:
    from torch import Tensor

NUMERICS = 4
"""Raised whenever the same inputs would give other parts."""


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
        self._read: dict[Path, dict[str, Part]] = {}

    def file(self, group: str, choice: Choice) -> Path:
        """Where the part lies, once it is made."""
        scheme_name, method = choice
        if scheme(scheme_name).weights is None:
            return self._kept_directory(parse_method(method).transforms) / f"{group}.safetensors"
        data = needs_data(choice) or smoothed(choice)
        return self._place(f"{scheme_name}-{method}", data) / f"{group}.safetensors"

    def kept_file(self, transforms: tuple[str, ...]) -> Path:
        """Embeddings, norms, head and biases, after the transforms."""
        return self._kept_directory(transforms) / "kept.safetensors"

    def kv_file(self, kv: str, transforms: tuple[str, ...]) -> Path:
        """Calibrated scales of the KV cache."""
        label = "-".join(("kv", kv, *transforms))
        return self._place(label, data=True) / "kv.safetensors"

    @cached_property
    def smoothing(self) -> ScaleStore:
        """Smoothing scales, one set for all smoothed parts."""
        return ScaleStore(self._place(SMOOTH, data=True))

    @cached_property
    def massive(self) -> tuple[int, ...]:
        """Blocks that write a massive activation, looked for once; needs calibration data."""
        assert self.calibration
        file = self._place("massive", data=True) / "blocks.json"
        if not file.exists():
            with self._locked():
                if not file.exists():
                    found = massive_blocks(self.checkpoint, self.modules, self.calibration.sequences[0])
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_whole(file, json.dumps(found))
        return tuple(int(layer) for layer in json.loads(file.read_text(encoding="utf-8")))

    def scales(self, group: Group, choice: Choice) -> Scales:
        """The smoothing scales under which a finished part stands; none for a part of the plain model."""
        return self.smoothing.of(group.layer) if smoothed(choice) and group.kind != HEAD else {}

    def _kept_directory(self, transforms: tuple[str, ...]) -> Path:
        # A head that is among the groups is not among what is kept.
        head = ["bare"] if any(group.kind == HEAD for group in self.modules) else []
        return self._place("-".join(("kept", *head, *transforms)), data=bool(transforms))

    def _place(self, label: str, data: bool) -> Path:
        described = self.calibration.description if self.calibration and data else None
        decides = {
            "base": self._base,
            "label": label,
            "calibration": [described.sha256, described.samples, described.tokens] if described else None,
            "numerics": NUMERICS,
        }
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        return self.directory / f"{label}-{key}"

    def tensors(self, file: Path) -> Mapping[str, Part]:
        """Where every tensor of a part lies."""
        if file not in self._read:
            self._read[file] = read_file_parts(file)
        return self._read[file]

    def make(
        self,
        choices: Mapping[str, Iterable[Choice]],
        kv: Iterable[str] = (),
        label: str = "",
        transforms: tuple[str, ...] = (),
    ) -> None:
        """Make what is missing of ``choices`` by group name and of the schemes ``kv`` of the cache.

        All that is streamed is made in one pass over the model. ``transforms`` are the cache's. Where all is
        there, nobody is waited for.
        """
        wanted = {name: list(dict.fromkeys(many)) for name, many in choices.items()}
        caches = {one: self.kv_file(one, transforms) for one in kv if kv_scheme(one).calibrated}
        if self._missing(wanted) or _absent(caches):
            with self._locked():
                self._make(wanted, caches, label or "quantize", transforms)

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        """One process at a time makes parts."""
        return locked(self.directory / ".lock", "parts of variants", partial(print, file=sys.stderr))

    def _missing(self, choices: Mapping[str, Sequence[Choice]]) -> dict[str, list[Choice]]:
        """The choices that are not made, by group name."""
        found = {
            name: [one for one in wanted if not self.file(name, one).exists()]
            for name, wanted in choices.items()
        }
        return {name: some for name, some in found.items() if some}

    def _make(
        self,
        choices: Mapping[str, Sequence[Choice]],
        caches: Mapping[str, Path],
        label: str,
        transforms: tuple[str, ...],
    ) -> None:
        """What is missing, while no other process makes any."""
        missing, caches = self._missing(choices), _absent(caches)
        streamed = {name: [one for one in wanted if streams(one)] for name, wanted in missing.items()}
        smooth = SMOOTH in transforms or any(smoothed(c) for wanted in choices.values() for c in wanted)
        if any(streamed.values()) or caches:
            self._stream(streamed, caches, label, smooth, SMOOTH in transforms)
        others = {one for wanted in missing.values() for one in wanted if not streams(one)}
        for choice in sorted(others):
            self._split(choice, {name for name, wanted in missing.items() if choice in wanted})

    def _stream(
        self,
        wanted: Mapping[str, Sequence[Choice]],
        caches: Mapping[str, Path],
        label: str,
        smooth: bool,
        smooth_cache: bool,
    ) -> None:
        values: dict[int, tuple[float, Tensor]] = {}

        def keep(group: Group, choice: Choice, tensors: Mapping[str, Tensor]) -> None:
            save_whole(tensors, self.file(group.name, choice))

        def keep_kv(layer: int, keys: float, of_channels: Tensor) -> None:
            values[layer] = (keys, of_channels)

        sequences = self.calibration.sequences if self.calibration else ()
        make_parts(
            self.checkpoint,
            self.modules,
            wanted,
            sequences,
            keep,
            keep_kv if caches else None,
            label=label,
            scales=self.smoothing if smooth else None,
        )
        smoothing = self.smoothing if smooth_cache else None
        for file in caches.values():
            save_whole(kv_scales(values, self.modules, self.checkpoint, smoothing), file)

    def _split(self, choice: Choice, groups: set[str]) -> None:
        """Let llm-compressor make the whole model at a choice, and keep the parts of it."""
        bare = scheme(choice[0]).weights is None
        method = "+".join((*parse_method(choice[1]).transforms, "rtn")) if bare else choice[1]
        plan = Plan(
            groups={g.name: choice[0] if g.name in groups else "bf16" for g in self.modules}, method=method
        )
        folder = self._made_whole(plan, f"{choice[0]}-{method}")
        tensors = read_parts(folder)
        for group in self.modules:
            if group.name in groups:
                self._copy(_of(group, tensors), self.file(group.name, choice))
        if bare:
            linear = {f"{m.name}.weight" for m in self.modules.linears}
            kept = {name: part for name, part in tensors.items() if name not in linear}
            self._copy(kept, self.kept_file(parse_method(method).transforms))
        shutil.rmtree(folder)

    def _made_whole(self, plan: Plan, label: str) -> Path:
        folder = self.directory / f".whole-{label}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        log = self.directory / ".logs" / f"{label}.log"
        compress_whole(self.checkpoint, self.modules, plan, self.calibration, folder, log, label)
        return folder

    def _copy(
        self, tensors: Mapping[str, Part], target: Path, dtypes: Mapping[str, str] | None = None
    ) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(tensors, target, dtypes)
        target.chmod(READ_ONLY)

    def _kept(self, transforms: tuple[str, ...]) -> Path:
        file = self.kept_file(transforms)
        if file.exists():
            return file
        with self._locked():
            if file.exists():
                pass  # another process has made it meanwhile
            elif transforms == (SMOOTH,):
                self._keep_folded(file)
            elif transforms:
                method = "+".join((*transforms, "rtn"))
                self._make({group.name: [("bf16", method)] for group in self.modules}, {}, "quantize", ())
            else:
                kept = self._unquantized()
                self._copy(kept, file, {name: self._kept_dtype(name) for name in kept})
        return file

    def _keep_folded(self, file: Path) -> None:
        """Norms and biases with the smoothing scales in them, and all else that is kept."""
        kept = self._unquantized()
        dtypes = {name: self._kept_dtype(name) for name in kept}
        scales = self.smoothing.everything(self.modules.layers)
        changed = {}
        for name in kept:
            module, _, leaf = name.rpartition(".")
            if name in scales or (leaf == "bias" and f"{module}.rows" in scales):
                changed[name] = folded(name, read_tensor(kept[name]), scales).float()
        folder = file.with_name(".folded.safetensors")
        save_whole(changed, folder)
        self._copy(kept | read_file_parts(folder), file, dtypes)
        folder.unlink()

    def _unquantized(self) -> dict[str, Part]:
        left_out = {f"{member.name}.weight" for member in self.modules.linears}
        config, text = self.checkpoint.config, self.checkpoint.text_config
        if architecture(config).tied(config, text):
            left_out.add(f"{HEAD}.weight")  # a copy of the embeddings, which engines do not load
        stored = read_parts(self.checkpoint.path)
        return {name: part for name, part in stored.items() if name not in left_out}

    def _kept_dtype(self, name: str) -> str:
        return self.checkpoint.kept(name, self.checkpoint.tensors[name]).dtype

    def files(self, plan: Plan) -> dict[str, Path]:
        """Every file of ``plan`` by its name in a linked directory; parts that are missing are made."""
        transforms = self._transforms(plan)
        choices = {group.name: self._choice(plan, group, transforms) for group in self.modules}
        calibrated = kv_scheme(plan.kv).calibrated
        if calibrated and transforms not in ((), (SMOOTH,)):
            raise MethodError(
                f"a calibrated KV cache ({plan.kv}) is made together with transforms only in a uniform plan"
            )
        ordered = {group.name for group in asymmetric_groups(self.modules, choices)}
        wanted = {name: [choice] for name, choice in choices.items() if name not in ordered}
        self.make(wanted, kv=[plan.kv], label=plan.describe(), transforms=transforms)
        files = {name: self.file(name, choices[name]) for name in wanted}
        if ordered:
            files |= self._in_order(choices, ordered, plan.describe())
        found = {f"{name}.safetensors": files[name] for name in choices}
        found["kept.safetensors"] = self._kept(transforms)
        if calibrated:
            found["kv.safetensors"] = self.kv_file(plan.kv, transforms)
        return found

    def _in_order(
        self, choices: Mapping[str, Choice], ordered: Collection[str], label: str
    ) -> dict[str, Path]:
        """The files of the groups ``ordered`` of a plan; what is missing is made."""
        if self.calibration is None:
            raise QuantizeError("gptaq needs calibration data; set calibration in the YAML")
        plan = hashlib.sha256(json.dumps(sorted(choices.items())).encode()).hexdigest()[:12]
        directory = self._place(f"ordered-{plan}", data=True)
        files = {name: directory / f"{name}.safetensors" for name in ordered}
        if not _absent(files):
            return files

        def stored(group: Group) -> Mapping[str, Part] | None:
            file = files.get(group.name) or self.file(group.name, choices[group.name])
            return self.tensors(file) if file.exists() else None

        smooth = any(map(smoothed, choices.values()))
        with self._locked():
            if smooth and self.smoothing.missing(self.modules.layers):
                self._stream({}, {}, label, True, False)
            make_in_order(
                self.checkpoint,
                self.modules,
                choices,
                self.calibration.sequences,
                stored,
                lambda group, tensors: save_whole(tensors, files[group.name]),
                lambda group: self.scales(group, choices[group.name]),
                label,
            )
        return files

    def link(self, plan: Plan, out: Path) -> None:
        """Put ``plan`` together in ``out`` from hard links; what was there before is removed."""
        files = self.files(plan)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        index = {}
        for name, file in files.items():
            link_or_copy(file, out / name)
            index.update(dict.fromkeys(self.tensors(file), name))
        write_whole(out / INDEX, json.dumps({"metadata": {}, "weight_map": index}))
        self._describe(plan, out)

    def assemble(self, plan: Plan, out: Path) -> None:
        """Write the checkpoint of ``plan`` into ``out``, in files of its own.

        Raises MethodError when the parts of the plan's methods do not fit together.
        """
        files = self.files(plan)
        tensors = {name: part for file in files.values() for name, part in self.tensors(file).items()}
        out.mkdir(parents=True, exist_ok=True)
        write_shards(tensors, out)
        self._describe(plan, out)

    def _describe(self, plan: Plan, out: Path) -> None:
        config = dict(self.checkpoint.config)
        if self.checkpoint.dtype not in ("BF16", "F16"):
            config["dtype"] = "float16" if self.checkpoint.serving_dtype == "F16" else "bfloat16"
            config.pop("torch_dtype", None)
        if any(scheme(name).weights for name in plan.groups.values()) or kv_scheme(plan.kv).arguments():
            config["quantization_config"] = quantization_config(plan, self.modules)
        write_whole(out / "config.json", json.dumps(config, indent=2) + "\n")
        copy_companions(self.checkpoint, out)

    def _choice(self, plan: Plan, group: Group, transforms: tuple[str, ...]) -> Choice:
        name = plan.groups[group.name]
        if scheme(name).weights is None:
            return ("bf16", "+".join((*transforms, "rtn")))
        return as_made(group, (name, plan.method_of(group.name)))

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


def _absent(files: Mapping[str, Path]) -> dict[str, Path]:
    return {name: file for name, file in files.items() if not file.exists()}


def _of(group: Group, tensors: Mapping[str, Part]) -> dict[str, Part]:
    names = tuple(f"{member.name}." for member in group.members)
    return {
        name: part for name, part in tensors.items() if name.startswith(names) and not name.endswith(".bias")
    }
