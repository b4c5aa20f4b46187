"""Every path that infers is served, under every name that clients use for it; every other says why not."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
from gateway_stack import CHAT, Stack, running_gateway

from gateway.errors import GatewayError, NoReplicaError
from gateway.proxy.body import Body
from gateway.proxy.endpoints import CLOSED, KNOWN_PATHS, MISSING, Form, endpoint_of, errors_of, not_found

SERVED = {
    # vLLM 0.32's routes that infer, and where the gateway asks for them
    "/v1/chat/completions": "/v1/chat/completions",
    "/v1/chat/completions/batch": "/v1/chat/completions/batch",
    "/v1/chat/completions/render": "/v1/chat/completions/render",
    "/v1/chat/completions/derender": "/v1/chat/completions/derender",
    "/v1/completions": "/v1/completions",
    "/v1/completions/render": "/v1/completions/render",
    "/v1/completions/derender": "/v1/completions/derender",
    "/v1/responses": "/v1/responses",
    "/v1/responses/render": "/v1/responses/render",
    "/v1/messages": "/v1/messages",
    "/v1/messages/count_tokens": "/v1/messages/count_tokens",
    "/v1/messages/render": "/v1/messages/render",
    "/v1/embeddings": "/v1/embeddings",
    "/v2/embed": "/v2/embed",
    "/v1/score": "/v1/score",
    "/score": "/v1/score",
    "/v1/rerank": "/v1/rerank",
    "/rerank": "/v1/rerank",
    "/v2/rerank": "/v1/rerank",
    "/classify": "/classify",
    "/pooling": "/pooling",
    "/tokenize": "/tokenize",
    "/detokenize": "/detokenize",
    "/invocations": "/invocations",
    "/inference/v1/generate": "/inference/v1/generate",
    "/generative_scoring": "/generative_scoring",
    "/v1/systemone": "/v1/systemone",
}


def test_what_engines_infer_is_served() -> None:
    for path, engine_path in SERVED.items():
        endpoint = endpoint_of(path)
        assert endpoint is not None, path
        assert endpoint.engine_path == engine_path


def test_aliases_mean_the_same_endpoint() -> None:
    for path in SERVED:
        endpoint = endpoint_of(path)
        assert endpoint_of(path + "/") is endpoint
        if path.startswith("/v1/"):
            assert endpoint_of(path.removeprefix("/v1")) is endpoint
            assert endpoint_of(path.removeprefix("/v1") + "/") is endpoint
    assert endpoint_of("/v1/tokenize") is endpoint_of("/tokenize")
    for path in ("", "/", "/v1", "/v1/", "/v1/chat", "/v1//chat/completions", "/V1/chat/completions"):
        assert endpoint_of(path) is None


def test_what_is_closed_says_so() -> None:
    for path in (*CLOSED, *MISSING):
        assert endpoint_of(path) is None
        assert "ask the engine itself" in not_found(path)
        assert "ask the engine itself" in not_found(path + "/")
    said = not_found("/v1/nothing")
    assert all(path in said for path in KNOWN_PATHS)


def test_what_invocations_ask_for() -> None:
    endpoint = endpoint_of("/invocations")
    assert endpoint is not None
    for body, form, chat in (
        (b'{"requestType": "CLOSE"}', Form.PLAIN, False),
        (b'{"requestType": "CLOSE", "prompt": ""}', Form.COMPLETIONS, False),
        (b'{"requestType": 1, "messages": []}', Form.COMPLETIONS, True),
        (b'{"requestType": 1, "input": ""}', Form.PLAIN, False),
        (b'{"messages": []}', Form.COMPLETIONS, True),
        (b'{"prompt": ""}', Form.COMPLETIONS, False),
        (b'{"input": ""}', Form.PLAIN, False),
    ):
        found = endpoint.of(Body(body))
        assert (found.form, found.chat, found.engine_path) == (form, chat, "/invocations")
        assert found.bare == (body == b'{"requestType": "CLOSE"}')
    chat_endpoint = endpoint_of(CHAT)
    assert chat_endpoint is not None
    assert chat_endpoint.of(Body(b"{}")) is chat_endpoint


@pytest.mark.parametrize(
    "path", ["/v1/messages", "/v1/messages/batches", "/messages/batches/x", "/v1/messages/"]
)
def test_errors_below_messages_are_anthropics(path: str) -> None:
    error: GatewayError = NoReplicaError("None.")
    assert errors_of(path).error(error) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "None."},
    }
    assert b"request-id" in errors_of(path).id_lines(b"a")


def test_other_errors_are_openais() -> None:
    for path in ("/v1/messagesx", "/v1/nothing", "/v1/chat/completions"):
        assert set(errors_of(path).error(NoReplicaError("None."))) == {"error"}


async def test_clients_reach_it_by_every_name(stack: Stack) -> None:
    for path in ("/v1/chat/completions", "/chat/completions", "/v1/chat/completions/", "/chat/completions/"):
        async with stack.post(path=path) as response:
            assert response.status == 200, path
    body = {"messages": [{"role": "user", "content": "hi"}], "model": None}
    async with stack.post(body) as response:
        assert response.status == 200
        assert response.headers["x-tiercel-variant"] == "assistant:bf16"


async def test_unserved_paths_are_told_in_the_clients_form(stack: Stack) -> None:
    async with stack.post(path="/v1/messages/batches") as response:
        assert response.status == 404
        error = await response.json()
        assert (error["type"], error["error"]["type"]) == ("error", "not_found_error")
        assert response.headers["request-id"] == response.headers["x-request-id"]
    async with stack.post(path="/sleep") as response:
        assert response.status == 404
        assert "closed here" in (await response.json())["error"]["message"]
    async with stack.post(path="/v1/messages", headers={"x-agent-role": "boss"}) as response:
        assert response.status == 400
        assert response.headers["request-id"] == response.headers["x-request-id"]


async def test_head_is_get_without_the_body(stack: Stack) -> None:
    for path in ("/health", "/ping", "/version", "/load", "/readiness", "/metrics", "/v1/models", "/models"):
        async with stack.http.get(stack.url + path) as got:
            whole = await got.read()
        async with stack.http.head(stack.url + path) as response:
            assert response.status == got.status == 200, path
            assert await response.read() == b""
            assert response.headers["content-type"] == got.headers["content-type"]
            if path not in ("/metrics",):  # its figures have moved on
                assert int(response.headers["content-length"]) == len(whole)


async def test_head_leaves_the_connection_in_step(stack: Stack) -> None:
    """An answer to HEAD with a body would be taken for the next answer's head."""
    host, _, port = stack.url.removeprefix("http://").partition(":")
    for path in (CHAT, "/nothing", "/v1/models", "/v1/messages/batches", "/health"):
        wire = (
            f"HEAD {path} HTTP/1.1\r\nhost: {host}\r\n\r\nGET /health HTTP/1.1\r\nhost: {host}\r\n"
            "connection: close\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(wire.encode())
            answer = await reader.read()
        finally:
            writer.close()
        first, _, rest = answer.partition(b"\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 ")
        assert rest.startswith(b"HTTP/1.1 200 OK\r\n"), path
        assert rest.endswith(b'{"status":"ok"}')


async def test_other_methods_are_told_which_there_are(stack: Stack) -> None:
    async with stack.http.put(stack.url + "/v1/models") as response:
        assert response.status == 405
        assert response.headers["allow"] == "GET, HEAD"
        assert "takes GET, HEAD" in (await response.json())["error"]["message"]


PREFLIGHT = {
    "origin": "https://app.example.com",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type",
}


async def test_pages_of_other_origins_are_not_let_in_by_default(stack: Stack) -> None:
    for path in (CHAT, "/v1/models"):
        async with stack.http.options(stack.url + path, headers=PREFLIGHT) as response:
            assert response.status == 405
            assert "access-control-allow-origin" not in response.headers
    async with stack.post(headers={"origin": "https://app.example.com"}) as response:
        assert "access-control-allow-origin" not in response.headers


async def test_pages_of_the_origins_that_are_named_are_let_in() -> None:
    allowed = "https://app.example.com"
    async with running_gateway(gateway={"cors_origins": (allowed,)}) as stack:
        for path in (CHAT, "/v1/models", "/v1/nothing"):
            async with stack.http.options(stack.url + path, headers=PREFLIGHT) as response:
                assert response.status == 200
                assert response.headers["access-control-allow-origin"] == allowed
                assert response.headers["access-control-allow-headers"] == "authorization, content-type"
                assert "POST" in response.headers["access-control-allow-methods"]
            other = PREFLIGHT | {"origin": "https://evil.example.com"}
            async with stack.http.options(stack.url + path, headers=other) as response:
                assert response.status == 403
                assert "access-control-allow-origin" not in response.headers
        for path in ("/admin/config", "/%61dmin/config"):
            async with stack.http.options(stack.url + path, headers=PREFLIGHT) as response:
                assert response.status == 403, "operators' routes are never opened"
            async with stack.http.get(stack.url + path, headers={"origin": allowed}) as response:
                assert "access-control-allow-origin" not in response.headers

        def opened(response: aiohttp.ClientResponse) -> bool:
            assert response.headers["vary"] == "origin"
            return response.headers.get("access-control-allow-origin") == allowed

        for stream in (False, True):
            async with stack.post({"stream": stream}, headers={"origin": allowed}) as response:
                assert opened(response)
                assert "x-request-id" in response.headers["access-control-expose-headers"]
        async with stack.post({"model": "nothing"}, headers={"origin": allowed}) as response:
            assert response.status == 404
            assert opened(response)
        async with stack.http.get(stack.url + "/v1/models", headers={"origin": allowed}) as response:
            assert opened(response)
        async with stack.post() as response:
            assert not opened(response)


async def test_all_origins_can_be_let_in() -> None:
    async with (
        running_gateway(gateway={"cors_origins": ("*",)}) as stack,
        stack.post(headers={"origin": "null"}) as response,
    ):
        assert response.headers["access-control-allow-origin"] == "*"
        assert "vary" not in response.headers
        assert json.loads(await response.text())["choices"]


def test_token_ids_are_not_listened_to() -> None:
    """The watch would take an answer without text for one that says nothing."""
    for path in SERVED:
        endpoint = endpoint_of(path)
        assert endpoint is not None
        assert endpoint.text is (path != "/inference/v1/generate")
