"""Routes that the gateway, the supervisor and the evaluator ask of an engine.

Names of metrics are those that the gateway reads of every engine (``vllm:…``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from ipaddress import ip_address
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from deploy.engine_server import MOST_BYTES, error_reply, read_body
from deploy.llama.engine import Task
from deploy.llama.scoring import COLUMNS, ReferenceHead, Scoring, unfit
from deploy.llama.server import Server
from quantize.export.llama import library
from quantize.export.modules import linears_of
from quantize.export.types import bits_of

WIDEST = 1 << 14
"""Of a hidden state, of two bytes each."""


class Operations:
    def __init__(self, server: Server) -> None:
        self._server, self._engine = server, server.engine
        self._head_lock = asyncio.Lock()

    async def models(self) -> Response:
        one = {"id": self._server.name, "object": "model", "owned_by": "llama.cpp"}
        return JSONResponse({"object": "list", "data": [{**one, "max_model_len": self._server.context}]})

    async def health(self) -> Response:
        if self._engine.broken is not None:
            return PlainTextResponse(f"the engine has ended: {self._engine.broken}", 503)
        return PlainTextResponse("draining", 503) if self._server.draining else Response()

    async def version(self) -> Response:
        return JSONResponse({"version": library().build})

    async def metrics(self) -> Response:
        engine, counts = self._engine, self._engine.counts
        label = f'{{model_name="{self._server.name}"}}'
        values = {
            "num_requests_running": engine.running,
            "num_requests_waiting": engine.waiting,
            "kv_cache_usage_perc": engine.cache_usage,
            "prompt_tokens_total": counts.prompt_tokens,
            "generation_tokens_total": counts.generated_tokens,
            "prefix_cache_queries_total": counts.prefix_queries,
            "prefix_cache_hits_total": counts.prefix_hits,
        }
        lines = [f"vllm:{name}{label} {value}" for name, value in values.items()]
        blocks = f'num_gpu_blocks="{engine.cache_tokens}",block_size="1"'
        return PlainTextResponse("\n".join([*lines, f"vllm:cache_config_info{{{blocks}}} 1", ""]))

    async def account(self) -> Response:
        """What is loaded, in the form of ``engine_site/account_route.py``."""
        modules: dict[str, dict[str, Any]] = {
            name: {
                "scheme": one.type,
                "method": "gguf",
                "kernel": "",
                "bits": bits_of(one.type),
                "parameters": {"weight": [one.type, one.bytes]},
                "in_kernel": 0,
            }
            for name, one in linears_of(self._server.file).items()
        }
        whole = all(module["bits"] >= 16 for module in modules.values())
        rank = {
            "modules": modules,
            "quantization": None if whole else "gguf",
            "kv_dtypes": ["float16"],
            "weight_bytes": self._engine.model.weight_bytes,
            "device_bytes": None,
        }
        return JSONResponse({"version": f"llama.cpp {library().build}", "ranks": [rank]})

    async def describe(self) -> Response:
        found: dict[str, Any] = {"refusal": "", "vocabulary": self._engine.model.vocabulary}
        if (head := await self._reference_head()) is not None:
            found |= {"width": head.width, "dtype": head.dtype, "head": head.fingerprint()}
        return JSONResponse(found)

    async def _reference_head(self) -> ReferenceHead | None:
        server = self._server
        async with self._head_lock:
            if server.head is None and server.reference is not None:
                server.head = await asyncio.to_thread(ReferenceHead, server.reference)
        return server.head

    async def score(self, request: Request) -> Response:
        most = MOST_BYTES + 2 * WIDEST * self._engine.cache_tokens
        line, _, hidden = (await read_body(request, most)).partition(b"\n")
        try:
            asked = json.loads(line)
            assert isinstance(asked, dict)
        except (ValueError, AssertionError, RecursionError):
            return error_reply(400, "the first line is no JSON object")
        head = await self._reference_head() if hidden else None
        vocabulary = self._engine.model.vocabulary
        if problem := unfit(asked, len(hidden), vocabulary, head):
            return error_reply(400, problem)
        if len(asked["tokens"]) > self._engine.cache_tokens:
            return error_reply(400, f"tokens: {len(asked['tokens'])} do not fit into the KV cache")
        scoring = Scoring(asked["tokens"], asked["start"], head, hidden)
        loop, done = asyncio.get_running_loop(), asyncio.Queue[Exception | None]()

        def deliver(error: Exception | None) -> None:
            loop.call_soon_threadsafe(done.put_nowait, error)

        task = Task(asked["tokens"], asked["start"], scoring.take, deliver)
        self._engine.submit(task)
        try:
            error = await done.get()
        finally:
            task.cancelled = True
        if error is not None:
            return error_reply(500, f"scoring failed: {type(error).__name__}: {error}")
        columns = scoring.columns()
        sizes = [[name, len(columns[name])] for name in COLUMNS if name in columns]
        found = {"vocabulary": vocabulary, "columns": sizes}
        body = json.dumps(found).encode() + b"\n" + b"".join(columns.values())
        return Response(body, media_type="application/octet-stream")

    async def drain(self, request: Request) -> Response:
        host = request.client.host if request.client else ""
        with contextlib.suppress(ValueError):
            if ip_address(host).is_loopback:
                self._server.draining = True
                return Response()
        return error_reply(403, "an engine is drained from its own machine alone")
