"""A hub of our own: repositories of files at commits, as huggingface_hub asks for them."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """What a repository holds by commit, what was asked for, and at which byte of a file it falls silent.

    ``commits`` are revisions by name. Without ``repository`` every one is there, at each revision with the
    files of the first commit. Ranges are answered as such unless ``knows_ranges`` says otherwise.
    """

    def __init__(self, repository: str | None, commits: Mapping[str, str]) -> None:
        self.repository, self.commits = repository, commits
        self.files: dict[str, dict[str, bytes]] = {}
        self.fetched: list[str] = []
        self.ranges: list[str] = []
        self.knows_ranges = True
        self.asked = 0
        self.cut: dict[str, int] = {}
        self.status = 200
        self.code = ""
        self.url = ""

    def handler(hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        named = r"[^/]+/[^/]+" if hub.repository is None else re.escape(hub.repository)

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
                elif found := re.fullmatch(rf"/api/models/({named})(?:/revision/(\w+))?", path):
                    self._describe(found[1], found[2] or "main")
                elif found := re.fullmatch(rf"/api/models/{named}/tree/(\w+)", path):
                    self._list(found[1])
                elif found := re.fullmatch(rf"/{named}/resolve/(\w+)/(.+)", path):
                    self._file(found[1], found[2])
                else:
                    self._send(404, b"{}", {"x-error-code": "RepoNotFound"})

            def _commit(self, revision: str) -> str | None:
                if hub.repository is None:
                    return next(iter(hub.files))
                commit = hub.commits.get(revision, revision)
                return commit if commit in hub.files else None

            def _describe(self, repository: str, revision: str) -> None:
                if (commit := self._commit(revision)) is None:
                    self._send(404, b"{}", {"x-error-code": "RevisionNotFound"})
                    return
                listed = [_sibling(name, raw) for name, raw in hub.files[commit].items()]
                body: dict[str, Any] = {"id": repository, "modelId": repository, "sha": commit}
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
                asked, cut = self.headers.get("range"), hub.cut.get(name)
                if asked is None or not hub.knows_ranges:
                    self._send(200, raw, headers, cut)
                    return
                hub.ranges.append(asked)
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                headers["content-range"] = f"bytes {start}-{len(raw) - 1}/{len(raw)}"
                self._send(206, raw[start:], headers, None if cut is None else max(0, cut - start))

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


def _sibling(name: str, raw: bytes) -> dict[str, Any]:
    """A file as a repository lists it; of weights with their digest."""
    found: dict[str, Any] = {"rfilename": name, "size": len(raw)}
    if name.endswith(".safetensors"):
        digest = hashlib.sha256(raw).hexdigest()
        found["lfs"] = {"sha256": digest, "size": len(raw), "pointerSize": 134}
    return found


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The hub's address inside the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub.handler())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub.url
    finally:
        server.shutdown()
        server.server_close()
