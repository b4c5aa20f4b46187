"""One more route of vLLM's server: log-probabilities of a prompt as numbers in binary, not as JSON.

``GET /tiercel/score`` tells the size of the vocabulary. ``POST /tiercel/score`` takes ``tokens`` (ids),
``start`` (index of the first token that is scored, at least 1) and ``top`` (0 for the whole vocabulary).
The answer is raw little-endian data, n = len(tokens) - start rows in the order of the tokens:

- ``top`` 0: float32 (n, vocabulary), natural-log probabilities by token id;
- else: float32 (n, top + 1), then int32 (n, top + 1) token ids; the first column is the token that came.

It is an endpoint plugin in vLLM's sense: it reaches the engine as vLLM's own handlers do, by
``EngineClient.generate``. vLLM would turn every number into Python objects of four lists first, which is
most of the cost; :func:`keep_arrays` keeps the engine's arrays as they came for requests of this route.
"""

from __future__ import annotations

import uuid
from argparse import Namespace
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, Field
from starlette.datastructures import State
from vllm import SamplingParams
from vllm.engine.protocol import EngineClient
from vllm.inputs import TokensPrompt
from vllm.v1.engine.logprobs import LogprobsProcessor

PATH = "/tiercel/score"
LARGEST_ANSWER = 1 << 30
"""Bytes; a request whose arrays would be larger is refused before any work."""


class Rows(list[Any]):
    """Arrays of prompt log-probabilities, one set per chunk of the prompt: (token ids, values)."""


class ScoreRequest(BaseModel):
    tokens: list[int] = Field(min_length=2)
    start: int = Field(ge=1)
    top: int = Field(default=0, ge=0)


def keep_arrays() -> None:
    """Let requests with flat prompt log-probabilities keep the engine's arrays. Others are untouched."""
    update, create = LogprobsProcessor._update_prompt_logprobs, LogprobsProcessor.from_new_request

    def from_new_request(tokenizer: Any, request: Any) -> Any:
        processor = create(tokenizer, request)
        parameters = request.sampling_params
        if parameters.flat_logprobs and parameters.prompt_logprobs is not None:
            processor.prompt_logprobs = Rows()
        return processor

    def keep(self: Any, tensors: Any) -> None:
        if not isinstance(self.prompt_logprobs, Rows):
            update(self, tensors)
            return
        token_ids, values, *_ = tensors
        self.prompt_logprobs.append((np.asarray(token_ids), np.asarray(values)))

    LogprobsProcessor.from_new_request = staticmethod(from_new_request)
    LogprobsProcessor._update_prompt_logprobs = keep


class ScoreRoute:
    """The plugin; vLLM calls its two methods while it builds the server."""

    name = "tiercel-score"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route(PATH, self.describe, methods=["GET"])
        app.add_api_route(PATH, self.score, methods=["POST"])

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        state.tiercel_engine = engine_client

    async def describe(self, request: Request) -> dict[str, int]:
        return {"vocabulary": _engine(request).model_config.get_vocab_size()}

    async def score(self, body: ScoreRequest, request: Request) -> Response:
        engine = _engine(request)
        vocabulary = engine.model_config.get_vocab_size()
        rows, columns = len(body.tokens) - body.start, body.top or vocabulary
        if rows < 1:
            raise HTTPException(400, f"start: {body.start} leaves none of {len(body.tokens)} tokens to score")
        if body.top >= vocabulary:
            raise HTTPException(400, f"top: {body.top} is not below the vocabulary's {vocabulary}; send 0")
        if (size := len(body.tokens) * columns * 8) > LARGEST_ANSWER:
            raise HTTPException(413, f"{size} bytes of log-probabilities; send fewer tokens or a smaller top")
        wanted = SamplingParams(
            max_tokens=1,
            temperature=0,
            prompt_logprobs=body.top or -1,
            flat_logprobs=True,
            detokenize=False,
        )
        prompt, kept = TokensPrompt(prompt_token_ids=body.tokens), Rows()
        try:
            async for output in engine.generate(prompt, wanted, f"score-{uuid.uuid4().hex}"):
                kept.extend(output.prompt_logprobs or ())
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        ids = np.concatenate([part[0] for part in kept])[-rows:]
        values = np.concatenate([part[1] for part in kept])[-rows:].astype("<f4")
        if body.top:
            return Response(
                values.tobytes() + ids.astype("<i4").tobytes(), media_type="application/octet-stream"
            )
        whole = np.empty((rows, vocabulary), "<f4")
        np.put_along_axis(whole, ids.astype(np.int64), values, axis=1)
        return Response(whole.tobytes(), media_type="application/octet-stream")


def _engine(request: Request) -> Any:
    engine = request.app.state.tiercel_engine
    if engine is None:
        raise HTTPException(503, "this server has no engine")
    return engine
