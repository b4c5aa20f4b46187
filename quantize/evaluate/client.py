"""The evaluator's way to an engine: vLLM's OpenAI-compatible HTTP interface, and one route of ours.

Anything that the engine computes differently from a fake-quantized model (kernels, KV cache,
defaults) is in these answers, which is the point of asking the engine. An engine that we started has a
route that computes the exact KL to a reference (``score_route.py`` beside its entry), from the final hidden
states that were kept of it. Any other vLLM tells some tokens' log-probabilities, which bound the KL
(:mod:`quantize.evaluate.bounds`): those of the reference's likeliest tokens where it runs the V2 model
runner, its own likeliest ones where not.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import aiohttp

from quantize.evaluate.bounds import kl_bounds
from quantize.evaluate.reference import Kept
from quantize.evaluate.scores import Likeliest, Scored, from_rows

SCORE_ROUTE, GENERATE_ROUTE = "/tiercel/score", "/inference/v1/generate"
TOPS_IN_JSON = (64, 20)
"""Likeliest tokens that are asked of an engine without our route; vLLM gives 20 at most by default."""
TIMEOUT_S = 600.0
"""For one request; a long prompt on a busy processor takes minutes."""


class EngineError(RuntimeError):
    """The engine answered with an error, or not at all."""


class EngineClient:
    """One engine. Use as an async context manager; at most ``concurrency`` requests are in flight.

    ``softcap`` is the largest magnitude of the model's logits, where it caps them: with it the KL that a
    server without our route shows is bounded from above.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        concurrency: int = 24,
        softcap: float | None = None,
        headers: Mapping[str, str] | None = None,
        verify: bool = True,
    ) -> None:
        """``headers`` are sent with every request; without ``verify`` any certificate will do."""
        self._base_url, self._model, self._softcap = base_url, model, softcap
        self._headers, self._verify = dict(headers or {}), verify
        self._account: dict[str, Any] | None = None
        self._asked = self._ids_refused = False
        self._top = TOPS_IN_JSON[0]
        self._slots = asyncio.Semaphore(concurrency)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> EngineClient:
        # A connection each: vLLM closes one that is idle for 5 s, and a loop that computes meanwhile sees
        # it only when it has sent the next request, of which nobody knows then whether it was begun.
        connector = aiohttp.TCPConnector(limit=0, force_close=True, ssl=self._verify)
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S), connector=connector, headers=self._headers
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session:
            await self._session.close()

    async def answer(
        self,
        messages: Sequence[dict[str, str]],
        max_tokens: int,
        json_schema: Mapping[str, Any] | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> str:
        """The greedy answer to a conversation; with ``json_schema`` the engine guides it to be valid.

        ``template`` is for the chat template (vLLM's ``chat_template_kwargs``).
        """
        body = _guided(_greedy(messages, max_tokens, template), json_schema)
        reply = await self._post("/v1/chat/completions", body)
        return str(reply["choices"][0]["message"]["content"] or "")

    async def written(
        self, messages: Sequence[dict[str, str]], max_tokens: int, template: Mapping[str, Any] | None = None
    ) -> tuple[str, list[int], bool]:
        """The greedy answer, its tokens as they were written, and whether it ended by itself."""
        body = {**_greedy(messages, max_tokens, template), "return_token_ids": True}
        choice = (await self._post("/v1/chat/completions", body))["choices"][0]
        tokens = [int(token) for token in choice.get("token_ids") or ()]
        return str(choice["message"]["content"] or ""), tokens, choice.get("finish_reason") == "stop"

    async def write(self, tokens: Sequence[int], count: int) -> int:
        """Have ``count`` tokens written after a prompt of token ids, whatever they are; how many were."""
        body = {"prompt": list(tokens), "max_tokens": count, "ignore_eos": True, "temperature": 0}
        return int((await self._post("/v1/completions", body))["usage"]["completion_tokens"])

    async def tokenize(
        self,
        messages: Sequence[dict[str, str]],
        add_generation_prompt: bool = False,
        template: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, by the engine's own chat template."""
        body: dict[str, Any] = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        if template:
            body["chat_template_kwargs"] = dict(template)
        return [int(token) for token in (await self._post("/tokenize", body))["tokens"]]

    async def account(self) -> dict[str, Any] | None:
        """What the engine says of its hidden states and head; None where it has no route of ours. Raises
        EngineError where it has, and cannot score (it says why)."""
        if not self._asked:
            try:
                self._account = await self._get(SCORE_ROUTE)
            except EngineError as error:
                if " answered 404" not in str(error):
                    raise
            self._asked = True
        return self._account

    async def score_and_keep(self, tokens: Sequence[int], start: int) -> tuple[Scored, Kept]:
        """Figures of ``tokens[start:]``, each in its context (``start`` is at least 1), and what is to be
        kept so that variants can be compared with them."""
        if (account := await self.account()) is not None:
            reply = await self._route(tokens, start, {"keep": True}, b"")
            about = {name: account[name] for name in ("width", "dtype", "head")}
            return _scored(reply, account["vocabulary"]), Kept("hidden", about, reply["hidden"])
        likeliest, top = await self._likeliest(tokens, start)
        scored = Scored(likeliest.of(tokens[start:]), likeliest.top1(), likeliest.ids.shape[1])
        data = likeliest.ids.astype("<i4").tobytes() + likeliest.values.astype("<f8").tobytes()
        return scored, Kept("likeliest", {"width": likeliest.ids.shape[1], "top": top}, data)

    async def score_against(self, tokens: Sequence[int], start: int, kept: Kept) -> Scored:
        """Figures of ``tokens[start:]`` and their KL to the reference of which ``kept`` was kept."""
        account = await self.account()
        if (kept.kind == "hidden") != (account is not None):
            having = ("has no", "had one") if account is None else ("has a", "had none")
            raise EngineError(
                f"{self._base_url} {having[0]} {SCORE_ROUTE} and the reference's engine {having[1]}; measure "
                "both on engines of the same kind"
            )
        if account is not None:
            reply = await self._route(tokens, start, dict(kept.about), kept.data)
            return _scored(reply, account["vocabulary"])
        return await self._bounded(tokens, start, kept)

    async def _route(
        self, tokens: Sequence[int], start: int, more: dict[str, Any], data: bytes
    ) -> dict[str, bytes]:
        line = json.dumps({"tokens": list(tokens), "start": start, **more}).encode()
        async with self._slots:
            raw = await self._request("POST", SCORE_ROUTE, line + b"\n" + data)
        head, _, rest = raw.partition(b"\n")
        columns, at = {}, 0
        for name, size in json.loads(head)["columns"]:
            columns[str(name)] = rest[at : at + size]
            at += size
        rows = len(tokens) - start
        if len(rest) != at or len(columns.get("came", b"")) != rows * 8:
            raise EngineError(f"{self._base_url}{SCORE_ROUTE} answered {len(rest)} bytes for {rows} tokens")
        return columns

    async def _bounded(self, tokens: Sequence[int], start: int, kept: Kept) -> Scored:
        import numpy as np

        ids, values = _split(kept)
        theirs = Likeliest(ids, values)
        ours, top1 = await self._told(tokens, start, ids)
        cap = np.sort(values, axis=1)[:, -int(kept.about["top"])]
        pairs = [
            kl_bounds(theirs.row(i), ours.row(i), float(cap[i]), softcap=self._softcap)
            for i in range(len(values))
        ]
        lower, upper = (np.array(side) for side in zip(*pairs, strict=True))
        return Scored(ours.of(tokens[start:]), top1, ids.shape[1], lower, upper, reference_top1=theirs.top1())

    async def _told(self, tokens: Sequence[int], start: int, ids: Any) -> tuple[Likeliest, Any]:
        """What this engine tells of the reference's tokens ``ids`` (n, width) and of those that came, and its
        likeliest token of each place."""
        import numpy as np

        if not self._ids_refused:
            try:
                return await self._by_token_ids(tokens, start, ids)
            except EngineError as error:
                if " answered 4" not in str(error) and " answered 501" not in str(error):
                    raise
                self._ids_refused = True  # no such route, the V1 runner, or too many ids
        likeliest, _ = await self._likeliest(tokens, start)
        return likeliest, likeliest.top1().astype(np.int32)

    async def _by_token_ids(self, tokens: Sequence[int], start: int, ids: Any) -> tuple[Likeliest, Any]:
        """By ``prompt_logprob_token_ids``, which vLLM's V2 model runner has."""
        import numpy as np

        came = np.array(tokens[start:], np.int32)[:, None]
        asked = np.concatenate([np.where(ids == came, -1, ids), came], axis=1)
        parameters = {
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 1,
            "prompt_logprob_token_ids": asked.tolist(),
            "prompt_logprob_start": start - 1,
        }
        body = {"token_ids": list(tokens), "sampling_params": parameters}
        reply = await self._post(GENERATE_ROUTE, body)
        raw = base64.b64decode(reply["prompt_token_id_logprobs"])
        values = np.load(io.BytesIO(raw), allow_pickle=False).astype(np.float64)
        if values.shape != asked.shape:
            shapes = f"{values.shape} log-probabilities for {asked.shape}"
            raise EngineError(f"{self._base_url}{GENERATE_ROUTE} answered {shapes}")
        best = [
            max(row, key=lambda token: float(row[token]["logprob"]))
            for row in reply["prompt_logprobs"][start:]
        ]
        return Likeliest(asked, values), np.array(best, np.int32)

    async def _likeliest(self, tokens: Sequence[int], start: int) -> tuple[Likeliest, int]:
        """By ``prompt_logprobs`` of vLLM's completions; and how many of the likeliest tokens are told."""
        while True:
            top = self._top  # other requests may lower it meanwhile
            body = {"prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
            try:
                rows = (await self._post("/v1/completions", body))["choices"][0]["prompt_logprobs"]
            except EngineError as error:
                if "max allowed" not in str(error) or top == TOPS_IN_JSON[-1]:
                    raise
                self._top = next(fewer for fewer in TOPS_IN_JSON if fewer < top)
                continue
            kept = [{int(t): float(entry["logprob"]) for t, entry in row.items()} for row in rows[start:]]
            return from_rows(kept), top

    async def version(self) -> str:
        return str((await self._get("/version"))["version"])

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self._slots:
            return _json(await self._request("POST", path, {"model": self._model, **body}))

    async def _get(self, path: str) -> dict[str, Any]:
        return _json(await self._request("GET", path, None))

    async def _request(self, method: str, path: str, body: dict[str, Any] | bytes | None) -> bytes:
        if self._session is None:
            raise EngineError("EngineClient is used outside of its context")
        url = self._base_url + path
        try:
            given: dict[str, Any] = {"data": body} if isinstance(body, bytes) else {"json": body}
            async with self._session.request(method, url, **given) as response:
                if response.status != 200:
                    raise EngineError(f"{url} answered {response.status}: {(await response.text())[:300]}")
                return await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineError(f"{url}: {type(error).__name__}: {error}") from None


def _greedy(
    messages: Sequence[dict[str, str]], max_tokens: int, template: Mapping[str, Any] | None
) -> dict[str, Any]:
    body = {"messages": list(messages), "max_tokens": max_tokens, "temperature": 0, "seed": 0}
    return {**body, "chat_template_kwargs": dict(template)} if template else body


def _guided(body: dict[str, Any], json_schema: Mapping[str, Any] | None) -> dict[str, Any]:
    if json_schema is None:
        return body
    schema = {"name": "answer", "schema": dict(json_schema)}
    return {**body, "response_format": {"type": "json_schema", "json_schema": schema}}


def _json(raw: bytes) -> dict[str, Any]:
    reply: dict[str, Any] = json.loads(raw)
    return reply


def _scored(reply: Mapping[str, bytes], vocabulary: int) -> Scored:
    import numpy as np

    kl = np.frombuffer(reply["kl"], "<f8") if "kl" in reply else None
    return Scored(
        came=np.frombuffer(reply["came"], "<f8"),
        top1=np.frombuffer(reply["top1"], "<i4"),
        vocabulary=vocabulary,
        kl=kl,
        kl_upper=kl,
        reference_top1=np.frombuffer(reply["reference_top1"], "<i4") if "reference_top1" in reply else None,
    )


def _split(kept: Kept) -> tuple[Any, Any]:
    """Ids and log-probabilities, (n, width) each, of a stock server's reference."""
    import numpy as np

    width = int(kept.about["width"])
    count = len(kept.data) // 12
    ids = np.frombuffer(kept.data, "<i4", count).reshape(-1, width)
    return ids, np.frombuffer(kept.data, "<f8", offset=count * 4).reshape(-1, width)
