"""Quantization-aware training of random models of a few hundred thousand weights, from parts to the stored
file."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantize.card import Calibration
from quantize.core.checkpoint import open_checkpoint
from quantize.core.dequantize import dequantized, read_tensor
from quantize.core.modules import read_modules
from quantize.core.plan import Plan, uniform
from quantize.core.schemes import scheme
from quantize.core.tensors import overwrite, read_parts
from quantize.cost import LIBRARIES_BYTES
from quantize.make.blocks import Files
from quantize.make.calibration import CalibrationSet
from quantize.make.parts import PartStore
from quantize.make.smooth import folded
from quantize.train import qat as training
from quantize.train.loop import DivergedError, TrainError
from quantize.train.qat import QatSettings, Text, Work, refuse_no_room, refuse_untrainable, train_variant
from quantize.train.qat_export import export, prove
from tests.quantize.tiny import make_checkpoint

QUICK = QatSettings(steps=6, block_steps=3, learning_rate=0.1, batch=4)


def sequences(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 2048) for _ in range(rng.randint(5, 24))] for _ in range(count)]


def work(
    folder: Path, groups: str | Mapping[str, str], method: str = "smooth+imatrix+gptq", kv: str = "auto"
) -> Work:
    """A random model, quantized into ``folder/base``; ``groups`` is a scheme, or schemes by the group's
    kind."""
    if not (folder / "model").exists():
        make_checkpoint(folder / "model")
    checkpoint = open_checkpoint(folder / "model")
    modules = read_modules(checkpoint)
    text = sequences(24)
    described = Calibration(source="drawn", sha256="0" * 64, samples=24, tokens=sum(map(len, text)))
    parts = PartStore(folder / "parts", checkpoint, modules, CalibrationSet(text, described))
    if isinstance(groups, str):
        plan = uniform(modules, groups, kv, method)
    else:
        plan = Plan(groups={group.name: groups[group.kind] for group in modules}, kv=kv, method=method)
    base = folder / "base"
    parts.assemble(plan, base)
    files, smooth = Files(checkpoint.path), method.startswith("smooth")
    layers = {member.name: group.layer for group in modules for member in group.members}
    return Work(
        checkpoint,
        modules,
        plan,
        base,
        lambda one: folded(
            f"{one.name}.weight",
            files[f"{one.name}.weight"].float(),
            parts.smoothing.of(layers[one.name]) if smooth else {},
        ).float(),
        Text(text),
        Text(sequences(6, seed=1)),
        folder / "run",
        {"model": "this", "text": "that"},
    )


CASES = {
    "4 bits with zero points": ("w4a16-g32-asym", "smooth+imatrix+gptq", "auto"),
    "4 bits without": ("w4a16-g64", "imatrix+gptq", "auto"),
    "8 bits, dynamic inputs": ("w8a8", "smooth+rtn", "auto"),
    "8 bits, static inputs": ("w8a8-static", "rtn", "auto"),
    "7 of 8 bits": ("w8a8-r7", "rtn", "auto"),
    "floats": ("fp8-dynamic", "rtn", "auto"),
    "4 bits and a cache of 8": ("w4a16-g32-asym", "smooth+imatrix+gptq", "fp8"),
    "3 bits": ("w3a16-g32-asym", "imatrix+gptq", "auto"),
    "2 bits": ("w2a16-g16-asym", "imatrix+gptq", "auto"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_exported_is_what_was_trained_bit_for_bit(case: str, tmp_path: Path) -> None:
    one = work(tmp_path, *CASES[case])
    before = {name: read_tensor(part).clone() for name, part in read_parts(one.base).items()}
    student, report = train_variant(one, QUICK)
    assert report.moved > 0
    computed = {name: weight.fake().detach().clone() for name, weight in student.weights.items()}
    assert export(student, one.base) > len(computed)
    stored = read_parts(one.base)
    for name, fake in computed.items():
        assert torch.equal(dequantized(stored, name, student.schemes[name]), fake), name
    after = {name: read_tensor(part) for name, part in stored.items()}
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    kinds = {name.rpartition(".")[2] for name in changed}
    assert {"weight_scale", "weight_packed" if "a16" in CASES[case][0] else "weight"} <= kinds
    assert any("layernorm" in name for name in changed)
    assert not any(
        "embed_tokens" in name or "lm_head" in name or name == "model.norm.weight" for name in changed
    )
    if CASES[case][2] == "fp8":
        assert {"k_scale", "v_scale"} <= kinds
    if "static" in CASES[case][0]:
        assert "input_scale" in kinds


def test_a_stored_integer_that_is_another_is_found(tmp_path: Path) -> None:
    one = work(tmp_path, "w8a8", "rtn")
    student, _ = train_variant(one, QUICK)
    export(student, one.base)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = read_tensor(read_parts(one.base)[name])
    weight[3, 5] += 1 if weight[3, 5] < 0 else -1
    overwrite(read_parts(one.base), {name: weight})
    with pytest.raises(TrainError, match=r"model.layers.1.mlp.up_proj .* is not what was trained"):
        prove(student, one.base)


def test_it_begins_as_what_it_is_begun_with_and_loses_less_at_the_end(tmp_path: Path) -> None:
    """Of text that it sees again and again, which a random model has nothing else to show for."""
    one = work(tmp_path, "w2a16-g16-asym", "imatrix+gptq")
    one = replace(one, choosing=one.text)
    _, report = train_variant(one, replace(QUICK, learning_rate=0.02, steps=60, block_steps=20))
    assert report.after < report.before
    assert [block["after"] < block["before"] for block in report.blocks] == [True, True]
    first, last = report.curve["evaluations"][0][1]["kl"], report.curve["evaluations"][-1][1]["kl"]
    assert last == pytest.approx(report.after)
    assert first < report.before, "the blocks have taken off some already"


def test_of_text_with_answers_the_answers_alone_are_learned(tmp_path: Path) -> None:
    one = work(tmp_path, "w2a16-g16-asym", "imatrix+gptq")
    answers = Text(one.text.sequences, [len(sequence) - 2 for sequence in one.text.sequences])
    settings = replace(QUICK, steps=1, block_steps=0, batch=len(answers.sequences))
    _, report = train_variant(replace(one, text=answers, choosing=answers), settings)
    _, everything = train_variant(
        replace(one, text=Text(answers.sequences), choosing=answers, directory=tmp_path / "other"), settings
    )
    (_, first), (_, of_all) = report.curve["points"][0][:2], everything.curve["points"][0][:2]
    assert first == pytest.approx(1000 * report.before, rel=1e-4)
    assert of_all != pytest.approx(first, rel=1e-3)


def test_a_mixed_plan_trains_every_group_at_its_own_bits(tmp_path: Path) -> None:
    groups = {
        "self_attn.qkv_proj": "w8a8",
        "self_attn.o_proj": "w8a8",
        "mlp.gate_up_proj": "w4a16-g32-asym",
        "mlp.down_proj": "bf16",
    }
    one = work(tmp_path, groups, "smooth+rtn")
    student, _ = train_variant(one, QUICK)
    assert {how.name for how in student.schemes.values()} == {"w8a8", "w4a16-g32-asym"}
    assert not any("down_proj" in name for name in student.weights)
    export(student, one.base)
    stored = read_parts(one.base)
    for name, weight in student.weights.items():
        assert torch.equal(dequantized(stored, name, student.schemes[name]), weight.fake().cpu())
        assert int(weight.codes().abs().max()) <= (128 if student.schemes[name].name == "w8a8" else 8)


def test_a_stopped_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    """Killed outright in the second stage; what it comes to is bit for bit what an undisturbed run comes
    to."""
    one = work(tmp_path, "w4a16-g32-asym", "imatrix+gptq")
    settings = replace(QUICK, steps=8)
    undisturbed, _ = train_variant(replace(one, directory=tmp_path / "other"), settings)
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from dataclasses import replace\n"
        "from quantize.train import loop, qat\n"
        "from tests.quantize.train import test_qat as t\n"
        "qat.KEPT = 2\n"
        "step = loop._Run.step\n"
        "def dying(self, number, *rest):\n"
        "    if number == 5 and self.place.directory.name == 'whole':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, number, *rest)\n"
        "loop._Run.step = dying\n"
        "one = t.work(Path(sys.argv[1]), 'w4a16-g32-asym', 'imatrix+gptq')\n"
        "qat.train_variant(one, replace(t.QUICK, steps=8))\n"
    )
    root = Path(__file__).parents[3]
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'agents'}"},
        cwd=root,
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert (tmp_path / "run" / "whole").is_dir()
    patched = pytest.MonkeyPatch()
    patched.setattr(training, "KEPT", 2)
    try:
        again, report = train_variant(one, settings)
    finally:
        patched.undo()
    assert len(report.curve["points"]) == 8
    assert {name: tensor.tolist() for name, tensor in again.latents().items()} == {
        name: tensor.tolist() for name, tensor in undisturbed.latents().items()
    }


def test_four_bits_are_trained_more_gently(tmp_path: Path) -> None:
    """At 0.006 steps of the grid a long run at 4 bits made the loss ten times as large."""
    four, two = (work(tmp_path / name, f"w{bits}a16-g32-asym") for name, bits in (("four", 4), ("two", 2)))
    assert (four.bits, two.bits) == (4, 2)
    usual = QatSettings()
    assert usual.rate(4_000_000, four.bits) == 0.0012 < usual.rate(4_000_000, two.bits) == 0.006
    assert usual.rate(106_000_000, 4) == usual.rate(106_000_000, 2) == pytest.approx(0.001165, rel=1e-3)
    assert QatSettings(learning_rate=0.01).rate(4_000_000, 4) == 0.01


def test_a_rate_that_explodes_is_stopped_and_says_what_to_do(tmp_path: Path) -> None:
    one = work(tmp_path, "w4a16-g64", "rtn")
    with pytest.raises(DivergedError, match="lower learning_rate"):
        train_variant(one, replace(QUICK, learning_rate=1e30, steps=30, block_steps=0))


def test_a_run_with_other_settings_does_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    one = work(tmp_path, "w4a16-g64", "rtn")
    train_variant(one, replace(QUICK, block_steps=0))
    with pytest.raises(TrainError, match="is of another run"):
        train_variant(one, replace(QUICK, block_steps=0, hidden=1.0))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fp8", "take fp8-dynamic"),
        ("fp8-block", "take fp8-dynamic"),
        ("mxfp4", "take w4a16-g32-asym"),
        ("bf16", "nothing to train"),
    ],
)
def test_a_scheme_that_is_not_trained_is_refused_with_another(name: str, words: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model")
    modules = read_modules(open_checkpoint(tmp_path / "model"))
    assert scheme(name).name == name
    with pytest.raises(TrainError, match=words):
        refuse_untrainable(uniform(modules, name, method="rtn"), modules)


def test_memory_that_will_not_do_is_said_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = work(tmp_path, "w4a16-g64", "rtn")
    needed = refuse_no_room(one, QUICK)
    assert needed > LIBRARIES_BYTES + 22 * one.weights

    class Little:
        available = needed - 1

    monkeypatch.setattr("psutil.virtual_memory", Little)
    with pytest.raises(TrainError, match="lower --batch"):
        refuse_no_room(one, QUICK)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 0, "block_steps": 0}, "steps: 0, block_steps: 0"),
        ({"steps": -1}, "steps: -1"),
        ({"hidden": -0.1}, "hidden: -0.1"),
        ({"batch": 0}, "batch: 0"),
        ({"learning_rate": float("nan")}, "learning_rate: nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, float], said: str) -> None:
    with pytest.raises(TrainError, match=said):
        QatSettings(**given)  # type: ignore[arg-type]


def test_a_report_is_json_that_says_what_was_recovered(tmp_path: Path) -> None:
    one = work(tmp_path, "w3a16", "rtn")
    one = replace(one, items={"core": Text(one.text.sequences[:4], [2, 2, 2, 2])})
    _, report = train_variant(one, QUICK)
    found = json.loads(report.as_json())
    assert found["recovered"] == pytest.approx(1 - found["after"] / found["before"])
    assert found["items"]["core"].keys() == {
        f"{when}_{what}" for when in ("before", "after") for what in ("kl", "right", "reference_right")
    }
