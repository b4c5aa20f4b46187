"""Models of a hub, fetched from a small one of our own: which files, once, and what is said."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from deploy.hub import HubError, ensure, is_there
from deploy.models import checkpoint_of
from gateway.config import ModelConfig, parse_config
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


class Hub:
    """What a repository holds by commit, what was asked for, and after how many bytes an answer is cut."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.fetched: list[str] = []
        self.asked = 0
        self.cut: dict[str, int] = {}
        self.status = 200
        self.code = ""
        self.url = ""

    def handler(hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.asked += 1
                path = unquote(urlsplit(self.path).path)
                if hub.status != 200:
                    self._send(hub.status, b"{}", {"x-error-code": hub.code, "x-error-message": hub.code})
                elif found := re.fullmatch(rf"/api/models/{REPOSITORY}(?:/revision/(\w+))?", path):
                    self._describe(found[1] or "main")
                elif found := re.fullmatch(rf"/api/models/{REPOSITORY}/tree/(\w+)", path):
                    self._list(found[1])
                elif found := re.fullmatch(rf"/{REPOSITORY}/resolve/(\w+)/(.+)", path):
                    self._file(found[1], found[2])
                else:
                    self._send(404, b"{}", {"x-error-code": "RepoNotFound"})

            def _commit(self, revision: str) -> str | None:
                commit = COMMITS.get(revision, revision)
                return commit if commit in hub.files else None

            def _describe(self, revision: str) -> None:
                if (commit := self._commit(revision)) is None:
                    self._send(404, b"{}", {"x-error-code": "RevisionNotFound"})
                    return
                listed = [{"rfilename": name, "size": len(raw)} for name, raw in hub.files[commit].items()]
                body: dict[str, Any] = {"id": REPOSITORY, "modelId": REPOSITORY, "sha": commit}
                self._send(200, json.dumps(body | {"siblings": listed, "private": False}).encode())

            def _list(self, revision: str) -> None:
                commit = self._commit(revision) or ""
                listed = [
                    {"type": "file", "path": name, "size": len(raw), "oid": hashlib.sha1(raw).hexdigest()}
                    for name, raw in hub.files[commit].items()
                ]
                self._send(200, json.dumps(listed).encode())

            def _file(self, revision: str, name: str) -> None:
                commit = self._commit(revision) or ""
                if (raw := hub.files.get(commit, {}).get(name)) is None:
                    self._send(404, b"{}", {"x-error-code": "EntryNotFound"})
                    return
                headers = {
                    "etag": f'"{hashlib.sha1(raw).hexdigest()}"',
                    "x-repo-commit": commit,
                }
                if self.command == "GET":
                    hub.fetched.append(name)
                self._send(200, raw, headers, hub.cut.get(name))

            def _send(
                self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None
            ) -> None:
                self.send_response(status)
                for name, value in {"content-type": "application/json", **(headers or {})}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body if cut is None else body[:cut])
                if cut is not None:
                    self.close_connection = True

        return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made, source = Hub(), write_base(tmp_path / "source")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    made.files[COMMITS["main"]] = files | OTHERS
    server = ThreadingHTTPServer(("127.0.0.1", 0), made.handler())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


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


def test_a_fetch_that_breaks_off_goes_on_with_what_is_missing(
    hub: Hub, model_of: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
    hub.cut["model.safetensors"] = 4000
    with pytest.raises(HubError) as broken:
        ensure(model)
    assert "cannot be fetched from" in str(broken.value)
    assert "what came is kept, and the same command goes on" in str(broken.value)
    assert not is_there(model)
    hub.cut.clear()
    hub.fetched.clear()
    ensure(model)
    assert hub.fetched == ["model.safetensors"]
    assert not [*model.path.glob(".cache/**/*.incomplete")]
    assert (model.path / "model.safetensors").read_bytes() == hub.files[COMMITS["main"]]["model.safetensors"]


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
    assert "acme/tiny has no model.safetensors, and weights are read from safetensors alone" in refusal(
        model_of()
    )
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
