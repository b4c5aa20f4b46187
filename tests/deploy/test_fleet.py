"""Several models in one file: what is started for them, where, and how a person names their variants."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import deploy.commands.fleet as command
import deploy.fleet.engines as fleet
from deploy.cli import main
from deploy.fleet.engines import engine_specs, without_ours
from deploy.models import one_model, registry_of, variant_of, variants_to_make
from deploy.placement import GIB, Gpu, Machine
from gateway.config import Config, ConfigError, load_config
from quantize.card import read_card, write_card
from quantize.core.checkpoint import open_checkpoint
from tests.deploy.test_supervisor import ROOT

STARTED = ["acme/large:bf16", "acme/large:int8", "small:int4"]
MACHINE = Machine({0: (0, 1, 2, 3)}, 32 * GIB)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two models of the same checkpoint: ``acme/large`` with bf16 and int8, ``small`` with bf16 elsewhere and
    int4."""
    place = tmp_path / "tiercel.yaml"
    model = ROOT / "deploy/assistant/model"
    place.write_text(
        f"""
models:
  acme/large: {{path: {model}, serve: [bf16, int8], engine: {{max_model_len: 512}}}}
  small:
    path: {model}
    serve: [bf16, int4]
    engine: {{kv_cache_gib: 2, env: {{SMALL: "1"}}, extra_args: [--api-key, secret]}}
variants_dir: variants
roles: {{core: {{}}, aux: {{models: [acme/large, small]}}}}
default_role: core
run_dir: run
pools: {{"small:bf16": ["http://user:word@10.0.0.1:8000"]}}
engine: {{base_port: 9100, env: {{SHARED: "1"}}}}
""",
        encoding="utf-8",
    )
    for one in load_config(place).each():
        registry_of(one).add_reference(open_checkpoint(one.path))
    copy_of(load_config(place), "acme/large", "int8")
    copy_of(load_config(place), "small", "int4")
    return place


def copy_of(config: Config, name: str, variant: str) -> None:
    """A variant with the reference's files, under another name."""
    model = config.of(name)
    shutil.copytree(model.variants_dir / "bf16", model.variants_dir / variant, symlinks=True)
    place = (model.variants_dir / variant / "current").resolve()
    write_card(read_card(place).model_copy(update={"variant": variant}), place)


@pytest.fixture(autouse=True)
def _a_machine_of_four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "look", lambda: MACHINE)
    monkeypatch.setattr(command, "look", lambda: MACHINE)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_every_model_has_its_own_directory_ports_and_settings(path: Path) -> None:
    config = load_config(path)
    specs = {spec.id: spec for spec in engine_specs(config)}
    assert list(specs) == STARTED
    assert [spec.port for spec in specs.values()] == [9100, 9101, 9103]
    large, small = specs["acme/large:int8"], specs["small:int4"]
    assert large.directory.parent == path.parent / "variants/acme--large/int8"
    assert large.log == path.parent / "run/logs/engine-acme--large-int8.log"
    assert (large.settings.max_model_len, large.settings.env) == (512, {"SHARED": "1"})
    assert small.settings.env == {"SHARED": "1", "SMALL": "1"}
    assert (small.settings.kv_cache_gib, small.settings.max_model_len) == (2, None)


def test_the_plan_is_printed_without_secrets(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fleet", "--config", str(path), "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [one["variant"] for one in found["engines"]] == [
        "acme/large:bf16",
        "acme/large:int8",
        "small:int4",
    ]
    small = found["engines"][2]
    assert (small["url"], small["kv_cache_bytes"]) == ("http://127.0.0.1:9103", 2 * GIB)
    assert small["memory_bytes"] > 2 * GIB
    assert small["arguments"][small["arguments"].index("--api-key") + 1] == "…"
    assert found["engines"][0]["context"] == 512
    assert found["engines"][0]["env"]["OMP_NUM_THREADS"] == "1"
    assert found["elsewhere"] == {"small:bf16": ["http://user:…@10.0.0.1:8000"]}
    main(["fleet", "--config", str(path)])
    shown = capsys.readouterr().out
    assert "secret" not in shown
    assert "small:bf16: elsewhere, http://user:…@10.0.0.1:8000" in shown
    assert not (path.parent / "run").exists()  # nothing was started, and nothing written


def test_what_up_refuses_is_refused_in_the_same_words(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Machine({0: (0, 1)}, 5 * GIB)
    monkeypatch.setattr(fleet, "look", lambda: small)
    monkeypatch.setattr(command, "look", lambda: small)
    text = said(capsys, "fleet", "--config", str(path))
    assert text == said(capsys, "up", "--config", str(path))
    assert f"{', '.join(STARTED)} do not fit on this machine side by side" in text
    assert "a KV cache of 1 GiB instead of 2" not in text  # which would not be enough
    assert "without acme/large:int8 and small:int4 (models.acme/large.serve, models.small.serve" in text
    shutil.rmtree(path.parent / "variants/small/int4")
    assert "make the variant with `tiercel quantize`" in said(capsys, "fleet", "--config", str(path))


def test_a_fleet_that_runs_is_no_reason_to_refuse_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own engines hold the memory that it would have."""
    run = path.parent / "run"
    run.mkdir()
    engines = {
        "small:int4": {"url": "http://127.0.0.1:9103", "pid": 4711, "gpus": [1], "memory": 10 * GIB},
        "small:bf16": {"url": "http://127.0.0.1:9102", "pid": 4712, "gpus": [1], "memory": 3 * GIB},
    }
    (run / "engines.json").write_text(json.dumps({"engines": engines}), encoding="utf-8")
    monkeypatch.setattr(fleet, "resident_bytes", lambda pid: 2 * GIB if pid == 4711 else None)
    gpus = tuple(Gpu(n, "made up", 24 * GIB, 8 * GIB) for n in range(2))
    found = without_ours(replace(MACHINE, gpus=gpus), run)
    assert [gpu.free for gpu in found.gpus] == [8 * GIB, 18 * GIB]  # the other one has ended
    assert found.memory_free == MACHINE.memory_free + 2 * GIB
    assert without_ours(MACHINE, path.parent) == MACHINE


def test_a_variant_is_named_in_full_or_alone_where_one_model_has_it(path: Path) -> None:
    config = load_config(path)
    assert variant_of(config, "acme/large:bf16")[0].name == "acme/large"
    model, variant = variant_of(config, "int4")
    assert (model.name, variant) == ("small", "int4")
    assert variant_of(config, "bf16", "small")[0].name == "small"
    for text, model_name, why in (
        ("bf16", None, "several models have such a variant; write one of: acme/large:bf16, small:bf16"),
        ("fp8", None, "no model has such a variant; write MODEL:fp8, of: acme/large, small"),
        ("tiny:bf16", None, "'tiny' is not a model; known: acme/large, small"),
        ("small:bf16", "acme/large", "'acme/large' is not the model of 'small:bf16'"),
        ("bf16", "tiny", "--model: 'tiny' is not a model"),
    ):
        with pytest.raises(ConfigError) as refused:
            variant_of(config, text, model_name)
        assert why in str(refused.value)
    with pytest.raises(ConfigError, match="there are several models; name one of: acme/large, small"):
        one_model(config)


@pytest.mark.parametrize(
    ("names", "model", "made"),
    [
        ([], None, {"acme/large": [], "small": []}),
        ([], "small", {"small": []}),
        (["int8", "small:int4"], None, {"acme/large": ["int8"], "small": ["int8", "int4"]}),
        (["small:int4"], None, {"small": ["int4"]}),
        (["int8"], "small", {"small": ["int8"]}),
    ],
)
def test_variants_are_made_of_every_model_unless_one_is_named(
    path: Path, names: list[str], model: str | None, made: dict[str, list[str]]
) -> None:
    assert variants_to_make(load_config(path), names, model) == made
    with pytest.raises(ConfigError, match="'tiny' is not a model"):
        variants_to_make(load_config(path), ["tiny:int8"], None)


def test_commands_take_a_model_or_a_whole_name(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["variants", "--config", str(path)])
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line in ("acme/large", "small")] == ["acme/large", "small"]
    main(["variants", "list", "--config", str(path), "--model", "small", "--json"])
    assert [one["variant"] for one in json.loads(capsys.readouterr().out)] == ["bf16", "int4"]
    main(["variants", "list", "--config", str(path), "--json"])
    listed = [(one["model"], one["variant"]) for one in json.loads(capsys.readouterr().out)]
    assert listed == [(m, v) for m, v in (("acme/large", "bf16"), ("acme/large", "int8"))] + [
        ("small", "bf16"),
        ("small", "int4"),
    ]
    main(["variants", "compare", "--config", str(path), "acme/large:bf16", "small:bf16"])
    assert "acme/large:bf16" in capsys.readouterr().out
    assert "several models have such a variant" in said(
        capsys, "variants", "show", "--config", str(path), "bf16"
    )
    assert "there are several models" in said(capsys, "quantize", "plan", "--config", str(path))
    main(["variants", "delete", "--config", str(path), "small:int4"])
    assert registry_of(load_config(path).of("small")).variants() == ("bf16",)
