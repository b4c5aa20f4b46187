"""`tiercel up MODEL` before any engine is started: what it refuses, what it writes, what it chooses."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
from pathlib import Path

import pytest

import deploy.starting as module
from deploy.engine import free_port
from deploy.gateway_process import UpError
from deploy.placement import Gpu, Machine, PlacementError
from deploy.served import who_serves
from deploy.starting import Arrived, arrive, bring_up, is_judged, known_model, refuse_too_large, settle
from gateway.config import Config, load_config
from quantize.card import Card, Evaluation, Outcome, Verdict, write_card
from quantize.core.checkpoint import CheckpointError
from quantize.core.engine_figures import Speed
from quantize.gate.judgement import judge
from tests.deploy.test_supervisor import ROOT
from tests.quantize.test_unlabelled import card as card_of
from tests.quantize.test_unlabelled import figures, text
from tests.quantize.tiny import change_config, make_checkpoint

GIB = 1 << 30


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "little")


@pytest.fixture
def arrived(model_dir: Path, tmp_path: Path) -> Arrived:
    return arrive(str(model_dir), tmp_path, lambda _text: None)


def test_a_directory_becomes_a_file_that_names_it(arrived: Arrived, model_dir: Path, tmp_path: Path) -> None:
    starter = arrived.starter
    assert (starter.name, starter.source, starter.is_hub) == ("little", str(model_dir), False)
    assert starter.serve[0] == "bf16"
    assert set(starter.serve[1:]) | set(starter.left_out) == {"int8", "fp8", "int4"}
    assert starter.python == ROOT / ".venv-engine/bin/python", "which lies beside the product"
    (tmp_path / ".venv-engine/bin").mkdir(parents=True)
    (tmp_path / ".venv-engine/bin/python").touch()
    assert arrive(str(model_dir), tmp_path, lambda _text: None).starter.python is None


def test_what_is_no_model_is_refused_with_a_sentence(model_dir: Path, tmp_path: Path) -> None:
    def refused(source: str | Path) -> str:
        with pytest.raises((UpError, CheckpointError)) as raised:
            bring_up(str(source), tmp_path / "tiercel.yaml", lambda _text: None)
        assert not (tmp_path / "tiercel.yaml").exists(), "before anything is written"
        return str(raised.value)

    assert "does not exist; give the directory of a checkpoint" in refused(tmp_path / "nowhere")
    (tmp_path / "weights.gguf").touch()
    assert "is a file; give the directory" in refused(tmp_path / "weights.gguf")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(tmp_path / "empty")
    strange = shutil.copytree(model_dir, tmp_path / "strange")
    change_config(strange, architectures=["StrangeForCausalLM"])
    assert "StrangeForCausalLM: it is not known how an engine fuses its modules" in refused(strange)


@pytest.fixture
def config(arrived: Arrived, tmp_path: Path) -> Config:
    path = tmp_path / "tiercel.yaml"
    starter = dataclasses.replace(arrived.starter, serve=("bf16", "int8", "int4"), left_out={})
    path.write_text(starter.text(), encoding="utf-8")
    return load_config(path)


def test_a_model_that_is_too_large_says_by_how_much_and_what_would_fit(
    arrived: Arrived, config: Config
) -> None:
    large = dataclasses.replace(arrived.modules, other_bytes=2 * GIB)
    groups = tuple(
        dataclasses.replace(
            group,
            members=tuple(
                dataclasses.replace(one, out_features=one.out_features * 2**15) for one in group.members
            ),
        )
        for group in large.groups
    )
    arrived = dataclasses.replace(arrived, modules=dataclasses.replace(large, groups=groups))
    (model,) = config.each()
    refuse_too_large(model, arrived, Machine({0: (0, 1)}, 100 * GIB))
    with pytest.raises(PlacementError) as raised:
        refuse_too_large(model, arrived, Machine({0: (0, 1)}, 12 * GIB))
    assert "little:bf16 needs about 2" in str(raised.value)
    assert "GiB more free memory" in str(raised.value)
    assert "In int4 (" in str(raised.value)
    assert "only what the 16-bit model answers shows what that loses" in str(raised.value)
    with pytest.raises(PlacementError, match="It fits in no precision that this machine serves"):
        refuse_too_large(model, arrived, Machine({0: (0, 1)}, 0, (Gpu(0, "small", 4 * GIB, 3 * GIB),), "1"))


def test_a_port_that_is_taken_is_said_before_work(
    config: Config, arrived: Arrived, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("no work was to be begun")

    monkeypatch.setattr(module, "prepare", never)
    path = tmp_path / "tiercel.yaml"
    port, base = free_port("127.0.0.1"), free_port("127.0.0.1", together=3)
    text = path.read_text(encoding="utf-8").replace("\nengine:\n", f"\nengine:\n  base_port: {base}\n")
    text = text.replace("gateway: { ", f"gateway: {{ port: {port}, ")
    for wanted, key in ((port, "gateway.port"), (base + 1, "engine.base_port")):
        with socket.socket() as other:
            other.bind(("127.0.0.1", wanted))
            other.listen()
            path.write_text(text, encoding="utf-8")
            with pytest.raises(UpError, match=f"port {wanted} on 127.0.0.1 is in use; .* set {key} to"):
                bring_up(str(model_dir), path, lambda _text: None)


def test_a_file_of_another_model_is_not_written_over(config: Config, tmp_path: Path, model_dir: Path) -> None:
    path = tmp_path / "tiercel.yaml"
    for source in (str(model_dir), "little"):
        assert known_model(config, source, path).name == "little"
    before = path.read_text(encoding="utf-8")
    with pytest.raises(
        UpError, match=r"tiercel\.yaml is there and has no model at .*but little; serve it with"
    ):
        known_model(config, str(tmp_path / "other"), path)
    assert path.read_text(encoding="utf-8") == before


SPEED = Speed(tokens_per_s=100, slowest=90, fastest=110, together=8, prompt_tokens=128, answer_tokens=48)


def judged(config: Config, variant: str, role_figures: object, bits: int, size: int) -> Card:
    """A variant that was measured, written where it belongs."""
    (model,) = config.each()
    card = card_of(figures(text=role_figures), bits)
    assert card.evaluation is not None
    roles = dict.fromkeys(model.roles, card.evaluation.roles["default"])
    card = card.model_copy(
        update={
            "model": model.name,
            "variant": variant,
            "weight_bits": bits,
            "weight_bytes": size,
            "files": {"config.json": f"{bits:064}"},
            "evaluation": Evaluation(roles=roles, text=text(), tasks_sha256="0", engine={}),
            "speed": SPEED,
        }
    )
    gate: dict[str, Verdict] = {role: judge(card, role, one.budget) for role, one in model.roles.items()}
    card = card.model_copy(update={"gate": gate})
    directory = model.variants_dir / variant / card.version
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"num_attention_heads": 4}), encoding="utf-8")
    write_card(card, directory)
    (directory.parent / "current").symlink_to(card.version)
    return card


def as_written(arrived: Arrived) -> Arrived:
    starter = dataclasses.replace(arrived.starter, serve=("bf16", "int8", "int4"), left_out={})
    return dataclasses.replace(arrived, starter=starter)


def test_the_file_says_what_is_served_and_who_serves_is_told(
    config: Config, arrived: Arrived, tmp_path: Path
) -> None:
    (model,) = config.each()
    assert not is_judged(model)
    cards = [
        judged(config, "bf16", text(0, 0, 0), 16, 1000),
        judged(config, "int4", text(0.2, 0.01, 0.25), 4, 300),
        judged(config, "int8", text(0.05, 0.005, 0.02), 8, 500),
    ]
    assert is_judged(model)
    said: list[str] = []
    settled = settle(config, tmp_path / "tiercel.yaml", model, as_written(arrived), said.append)
    assert settled.served == ("little:int8",)
    assert settled.watch.reference == "none"
    assert load_config(tmp_path / "tiercel.yaml") == settled
    table = who_serves(settled, settled.of("little"), cards)
    assert "little:int8 serves default, auxiliary and core: the cheapest that passes, judged by the" in table
    assert "by the reference's own answers to 96 conversations" in table
    assert "bf16 is not served: no role needs it" in table
    assert "int4 is not served: for default: mean KL 0.25000" in table
    again = settle(settled, tmp_path / "tiercel.yaml", model, as_written(arrived), said.append)
    assert again == settled, "and stays as it is"


def test_the_reference_serves_what_nothing_else_passes(
    config: Config, arrived: Arrived, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model,) = config.each()
    cards = [
        judged(config, "bf16", text(0, 0, 0), 16, 1000),
        judged(config, "int4", text(0.2, 0.01, 0.25), 4, 300),
        judged(config, "int8", text(0.05, 0.005, 0.08), 8, 500),
    ]
    assert cards[2].gate["core"].outcome == Outcome.FAILED
    path, said = tmp_path / "tiercel.yaml", list[str]()
    begun = path.read_text(encoding="utf-8")
    settled = settle(config, path, model, as_written(arrived), said.append)
    assert settled.served == ("little:bf16", "little:int8")
    assert settled.watch.reference == "live"
    table = who_serves(settled, settled.of("little"), cards)
    assert "little:bf16 serves core: nothing cheaper is shown to be good enough" in table
    path.write_text(begun, encoding="utf-8")
    monkeypatch.setattr(module, "look", lambda: Machine({0: (0, 1)}, 4 * GIB))
    alone = settle(config, path, model, as_written(arrived), said.append)
    assert alone.served == ("little:bf16",)
    assert "int8 would have no room beside bf16, which some role needs, and is not served" in said


def test_what_somebody_has_changed_stays(config: Config, arrived: Arrived, tmp_path: Path) -> None:
    path, written = tmp_path / "tiercel.yaml", as_written(arrived)
    (model,) = config.each()
    for variant, bits, size in (("bf16", 16, 1000), ("int8", 8, 500), ("int4", 4, 300)):
        judged(config, variant, text(0.05 * (bits < 16), 0.005, 0.02 * (bits < 16)), bits, size)
    own = path.read_text(encoding="utf-8").replace("core:", "core:  # mine")
    path.write_text(own, encoding="utf-8")
    assert settle(config, path, model, written, print).served == ("little:int8",), "it is not about that"
    assert "core:  # mine" in path.read_text(encoding="utf-8")
    other = own.replace("serve: [bf16, int8, int4]", "serve: [int4, bf16]")
    path.write_text(other, encoding="utf-8")
    changed = load_config(path)
    assert settle(changed, path, model, written, print) == changed
    assert path.read_text(encoding="utf-8") == other
