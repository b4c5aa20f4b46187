"""Models of a hub, fetched from a small one of our own: which files, once, and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.hub import HubError, ensure, is_there
from deploy.hub_weights import FETCHING
from deploy.models import checkpoint_of
from gateway.config import ModelConfig, parse_config
from tests.hub import Hub, serving
from tests.quantize.small import write_base

COMMITS = {"main": "a" * 40, "v2": "b" * 40}
REPOSITORY = "acme/tiny"
OTHERS = {
    "original/consolidated.00.pth": b"x" * 99,
    "original/tokenizer.model": b"x",
    "consolidated.safetensors": b"x" * 99,
    "params.json": b"{}",
    "pytorch_model.bin": b"x" * 99,
    "tiny.Q4_K_M.gguf": b"x" * 99,
    "onnx/model.onnx": b"x" * 99,
    "modeling_tiny.py": b"raise SystemExit",
    "README.md": b"# tiny",
    "LICENSE": b"free",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made, source = Hub(REPOSITORY, COMMITS), write_base(tmp_path / "source")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    made.files[COMMITS["main"]] = files | OTHERS
    with serving(made) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield made


@pytest.fixture
def model_of(tmp_path: Path) -> Callable[..., ModelConfig]:
    def made(hub: str = REPOSITORY, **more: str) -> ModelConfig:
        model = {"hub": hub, "serve": ["bf16"], **more}
        roles = {"roles": {"core": {}}, "default_role": "core"}
        text = json.dumps({"models": {"m": model}, "variants_dir": "variants", **roles})
        return parse_config(text, "test", tmp_path).of("m")

    return made


def test_what_an_engine_needs_is_fetched_once(hub: Hub, model_of: Callable[..., ModelConfig]) -> None:
    model, said = model_of(), list[str]()
    checkpoint = checkpoint_of(model, said.append)
    assert checkpoint.path == model.path
    there = {path.name for path in model.path.iterdir() if not path.name.startswith(".")}
    assert there == {*hub.files[COMMITS["main"]]} - {*OTHERS} | {"LICENSE"}
    assert not [name for name in hub.fetched if "/" in name or name.startswith(("consolidated", "README"))]
    assert said[0].startswith(f"m: fetching {len(there)} files of acme/tiny at aaaaaaaaaaaa")
    asked = hub.asked
    assert ensure(model) == model.path
    assert hub.asked == asked  # nobody is asked again


def test_shards_are_those_that_the_index_names(hub: Hub, model_of: Callable[..., ModelConfig]) -> None:
    files = hub.files[COMMITS["main"]]
    weights = files.pop("model.safetensors")
    files["model-00001-of-00001.safetensors"] = weights
    files["model-00001-of-00009.safetensors"] = b"of an older upload"
    head = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    index = {name: "model-00001-of-00001.safetensors" for name in head if name != "__metadata__"}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": index}).encode()
    checkpoint = checkpoint_of(model_of())
    assert set(checkpoint.tensors) == set(index)
    assert "model-00001-of-00009.safetensors" not in hub.fetched


@pytest.fixture
def broken_off(
    hub: Hub, model_of: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModelConfig]:
    """A model of which 4,000 bytes of weights have come; the hub answers again."""
    model = model_of()
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut["model.safetensors"] = 4000
    with pytest.raises(HubError) as broken:
        ensure(model)
    assert "cannot be fetched from" in str(broken.value)
    assert "what came is kept, and the same command goes on" in str(broken.value)
    assert not is_there(model)
    hub.cut.clear()
    hub.fetched.clear()
    hub.ranges.clear()
    yield model
    assert (model.path / "model.safetensors").read_bytes() == hub.files[COMMITS["main"]]["model.safetensors"]
    assert is_there(model)
    assert not (model.path / FETCHING).exists()


def test_a_fetch_that_breaks_off_goes_on_within_the_file(hub: Hub, broken_off: ModelConfig) -> None:
    ensure(broken_off)
    assert hub.fetched == ["model.safetensors"]
    assert hub.ranges == ["bytes=4000-"]


def test_a_hub_without_ranges_is_read_from_the_beginning(hub: Hub, broken_off: ModelConfig) -> None:
    hub.knows_ranges = False
    ensure(broken_off)


def test_what_came_damaged_is_said_and_fetched_again(hub: Hub, broken_off: ModelConfig) -> None:
    (partial,) = (broken_off.path / FETCHING).iterdir()
    partial.write_bytes(bytes(4000))
    with pytest.raises(HubError, match=r"FetchError: model.safetensors came damaged: its SHA-256 is "):
        ensure(broken_off)
    ensure(broken_off)
    assert hub.ranges == ["bytes=4000-"]


def test_another_revision_replaces_what_is_there(hub: Hub, model_of: Callable[..., ModelConfig]) -> None:
    files = hub.files[COMMITS["main"]]
    files["added_tokens.json"] = b"{}"
    ensure(model_of())
    later = {name: raw for name, raw in files.items() if name != "added_tokens.json"}
    hub.files[COMMITS["v2"]] = later | {"generation_config.json": b'{"temperature": 0.5}'}
    newer = model_of(revision="v2")
    assert not is_there(newer)
    ensure(newer)
    assert (newer.path / "generation_config.json").read_bytes() == b'{"temperature": 0.5}'
    assert not (newer.path / "added_tokens.json").exists()


def test_a_file_that_was_lost_is_fetched_again(hub: Hub, model_of: Callable[..., ModelConfig]) -> None:
    model = model_of()
    ensure(model)
    (model.path / "config.json").unlink()
    hub.fetched.clear()
    ensure(model)
    assert hub.fetched == ["config.json"]


def test_what_cannot_be_had_is_said(
    hub: Hub, model_of: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(model: ModelConfig) -> str:
        with pytest.raises(HubError) as refused:
            ensure(model)
        return str(refused.value)

    assert "has no acme/nothing that may be read; correct the id" in refusal(model_of("acme/nothing"))
    assert "models.m.revision: acme/tiny has no revision 'v9'" in refusal(model_of(revision="v9"))
    hub.status, hub.code = 403, "GatedRepo"
    assert f"acme/tiny is gated; accept its conditions at {hub.url}/acme/tiny" in refusal(model_of())
    hub.status = 200
    weights = hub.files[COMMITS["main"]].pop("model.safetensors")
    pickles = refusal(model_of())
    assert "acme/tiny has no model.safetensors, but pickles, which can run code and are not read" in pickles
    assert "give models.m.path: tiny-safetensors instead of hub:\n  hf download acme/tiny --loc" in pickles
    assert "M.from_pretrained('tiny', dtype='auto').save_pretrained('tiny-safetensors')" in pickles
    del hub.files[COMMITS["main"]]["pytorch_model.bin"]
    assert "and weights are read from safetensors alone; take a repository that has" in refusal(model_of())
    hub.files[COMMITS["main"]]["model.safetensors"] = weights
    monkeypatch.setattr("deploy.hub.shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    assert "0.00 GB are free at" in refusal(model_of())


def test_without_a_network_the_way_around_is_said(
    model_of: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(HubError) as refused:
        ensure(model_of())
    text = str(refused.value)
    assert "models.m.hub: acme/tiny cannot be fetched from http://127.0.0.1:9 (" in text
    assert "hf download acme/tiny --local-dir DIRECTORY" in text
    assert "models.m.path instead of hub" in text
