"""One more route of vLLM's server: exact figures of a prompt's tokens, and their KL to a reference.

``GET /tiercel/score`` tells the ``vocabulary``, ``width`` and ``dtype`` of the final hidden states, a
fingerprint of the ``head`` and the model ``runner``; 501 with the reason where this engine cannot score.

``POST /tiercel/score`` takes one line of JSON, a newline, and perhaps bytes. The line holds ``tokens`` (ids),
``start`` (index of the first token that is scored, at least 1), ``keep`` (return the final hidden states),
and ``head``, ``width`` and ``dtype`` of the hidden states of a reference that follow in bytes: n rows, n =
len(tokens) - start, row i being of the token before ``tokens[start + i]``. The answer is built alike: a line
with ``columns``, the names and bytes of what follows, little-endian, n values each:

- ``came`` float64, natural-log probability of the token that came; ``top1`` int32, the likeliest token;
- with a reference ``kl`` float64, KL(reference || this), nats, over the whole vocabulary, and
  ``reference_top1`` int32;
- with ``keep`` ``hidden``, (n, width) of the engine's own dtype.

It is an endpoint plugin in vLLM's sense: it reaches the engine as vLLM's own handlers do, by ``generate`` and
``collective_rpc``. Numbers are reduced in the workers, by :mod:`score_worker`.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, Field, ValidationError
from score_worker import disagreement  # type: ignore[import-not-found]
from starlette.datastructures import State
from vllm import SamplingParams
from vllm.engine.protocol import EngineClient
from vllm.inputs import TokensPrompt

PATH = "/tiercel/score"
REFERENCE = "TIERCEL_REFERENCE"
"""Environment variable: directory of the reference's checkpoint, of which the head is read where the
variant's own is another."""
ADAPTER = "TIERCEL_ADAPTER"
"""Environment variable: name of the LoRA adapter that the variant carries, and is scored with."""
COLUMNS = ("came", "top1", "kl", "reference_top1", "hidden")


class ScoreRequest(BaseModel):
    tokens: list[int] = Field(min_length=2)
    start: int = Field(ge=1)
    keep: bool = False
    head: str = ""
    width: int = 0
    dtype: str = ""


class ScoreRoute:
    """The plugin; vLLM calls its two methods while it builds the server."""

    name = "tiercel-score"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route(PATH, self.describe, methods=["GET"])
        app.add_api_route(PATH, self.score, methods=["POST"])

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        state.tiercel_engine, state.tiercel_described = engine_client, None
        state.tiercel_reference_head, state.tiercel_loading = None, asyncio.Lock()

    async def describe(self, request: Request) -> dict[str, Any]:
        state, engine = request.app.state, request.app.state.tiercel_engine
        if engine is None:
            raise HTTPException(503, "this server has no engine")
        if state.tiercel_described is None:
            try:
                ranks = await engine.collective_rpc("tiercel_describe")
            except Exception as error:
                raise HTTPException(501, f"the engine's workers cannot score: {error}") from None
            state.tiercel_described = next((one for one in ranks if one.get("head")), ranks[0])
        if reason := state.tiercel_described["refusal"]:
            raise HTTPException(501, reason)
        described: dict[str, Any] = state.tiercel_described
        return described

    async def score(self, request: Request) -> Response:
        line, _, reference = (await request.body()).partition(b"\n")
        try:
            body = ScoreRequest.model_validate_json(line)
        except ValidationError as error:
            raise HTTPException(400, str(error)) from None
        described = await self.describe(request)
        engine, key = request.app.state.tiercel_engine, f"tiercel-{uuid.uuid4().hex}"
        other_head = bool(reference) and body.head != described["head"] and bool(os.environ.get(REFERENCE))
        if other_head:
            described = {**described, "head": await self._reference_head(request)}
        if problem := unfit(body, len(reference), described):
            raise HTTPException(400, problem)
        prompt = TokensPrompt(prompt_token_ids=body.tokens)
        # The token it draws is compared with ours: that of the right row of the right request.
        wanted = SamplingParams(
            max_tokens=1, temperature=0, logprobs=0, detokenize=False, skip_reading_prefix_cache=True
        )
        drawn: list[tuple[int, float]] = []
        try:
            await engine.collective_rpc(
                "tiercel_begin",
                args=(key, body.start, body.tokens, reference or None, body.keep, other_head),
            )
            try:
                async for output in engine.generate(prompt, wanted, key, lora_request=_adapter(request)):
                    for token, values in zip(
                        output.outputs[0].token_ids, output.outputs[0].logprobs or (), strict=False
                    ):
                        drawn.append((token, values[token].logprob))
            finally:
                ranks = await engine.collective_rpc("tiercel_end", args=(key,))
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        found = [one for one in ranks if one is not None]
        problem = next((one["error"] for one in found if "error" in one), "")
        if problem := problem or disagreement(found, drawn):
            raise HTTPException(500, problem)
        columns = {name: found[0][name] for name in COLUMNS if name in found[0]}
        head = {**described, "columns": [[name, len(raw)] for name, raw in columns.items()]}
        return Response(
            json.dumps(head).encode() + b"\n" + b"".join(columns.values()),
            media_type="application/octet-stream",
        )

    async def _reference_head(self, request: Request) -> str:
        """Fingerprint of the reference's head, which is loaded when it is first needed."""
        state = request.app.state
        async with state.tiercel_loading:
            if state.tiercel_reference_head is None:
                try:
                    heads = await state.tiercel_engine.collective_rpc(
                        "tiercel_load_head", args=(os.environ[REFERENCE],)
                    )
                except Exception as error:
                    raise HTTPException(500, f"the reference's head was not loaded: {error}") from None
                state.tiercel_reference_head = next(filter(None, heads), "")
        return str(state.tiercel_reference_head)


def _adapter(request: Request) -> Any:
    """The adapter that the variant carries, as the engine knows it; None for a variant without."""
    if not (name := os.environ.get(ADAPTER)):
        return None
    if (found := request.app.state.openai_serving_models.lora_requests.get(name)) is None:
        raise HTTPException(500, f"the engine has not loaded the adapter {name!r} that the variant carries")
    return found


def unfit(body: ScoreRequest, reference_bytes: int, described: dict[str, Any]) -> str:
    """Why a request cannot be scored, before any work; an empty string where it can."""
    rows = len(body.tokens) - body.start
    if rows < 1:
        return f"start: {body.start} leaves none of {len(body.tokens)} tokens to score"
    if wrong := next((token for token in body.tokens if not 0 <= token < described["vocabulary"]), None):
        return f"tokens: {wrong} is out of vocabulary, which has {described['vocabulary']} tokens"
    if not reference_bytes:
        return ""
    for name in ("width", "dtype", "head"):
        if (theirs := getattr(body, name)) != (ours := described[name]):
            return (
                f"the reference's hidden states are of another model or head ({name} {theirs}, here {ours}); "
                f"for a variant whose head is quantized set {REFERENCE} to the reference's checkpoint"
            )
    size = 4 if body.dtype == "float32" else 2
    if reference_bytes != (expected := rows * body.width * size):
        return (
            f"{reference_bytes} bytes of hidden states for {rows} rows of {body.width}; {expected} expected"
        )
    return ""
