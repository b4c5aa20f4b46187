"""The routes: ``/classify`` as vLLM has it, chat in which the label is answered, and what the gateway and the
evaluator ask of an engine (as of ``deploy/llama``).

To the evaluator a conversation's tokens are those of its last user message, and an answer that is a label is
one token behind them, with an id after those of words.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import uuid
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from deploy.encoder.classifier import Classifier, likeliest
from deploy.encoder.requests import (
    ChatAsked,
    ClassifyAsked,
    CompletionAsked,
    ScoreAsked,
    TokenizeAsked,
    answered,
    last_user,
)
from deploy.engine_server import (
    BadRequestError,
    StreamOptions,
    add_handlers,
    asked_of,
    error_reply,
    read_body,
)
from quantize.card import ONNX

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_TOLD = 20
LONGEST_SHOWN = 60


def make_app(classifier: Classifier, name: str, build: str) -> FastAPI:
    """The application; ``build`` is onnxruntime's version."""
    app = FastAPI(title="classifier", docs_url=None, redoc_url=None)
    routes = Routes(classifier, name, build)
    for method, path, work in (
        ("POST", "/classify", routes.classify),
        ("POST", "/v1/chat/completions", routes.chat),
        ("POST", "/v1/completions", routes.completions),
        ("POST", "/tokenize", routes.tokenize),
        ("GET", "/v1/models", routes.models),
        ("GET", "/health", routes.health),
        ("GET", "/version", routes.version),
        ("GET", "/metrics", routes.metrics),
        ("GET", "/tiercel/account", routes.account),
        ("GET", "/tiercel/score", routes.describe),
        ("POST", "/tiercel/score", routes.score),
        ("POST", "/tiercel/drain", routes.drain),
    ):
        app.add_api_route(path, work, methods=[method], response_model=None)
    add_handlers(app)
    return app


class Routes:
    def __init__(self, classifier: Classifier, name: str, build: str) -> None:
        self._of, self._name, self._build = classifier, name, build
        self._draining = False

    async def classify(self, request: Request) -> Response:
        texts = (await asked_of(request, ClassifyAsked)).texts
        rows = [np.exp(row) for row in await self._of.of_texts(texts)]
        data = [
            {
                "index": index,
                "label": self._of.labels[likeliest(row, 1)[0]],
                "probs": row.tolist(),
                "num_classes": len(row),
            }
            for index, row in enumerate(rows)
        ]
        read = sum(len(self._of.tokens.whole(text)) for text in texts)
        return JSONResponse(
            {**self._common("classify"), "object": "list", "data": data, "usage": _usage(read, 0)}
        )

    async def chat(self, request: Request) -> Response:
        asked = await asked_of(request, ChatAsked)
        text = last_user(asked.messages)
        (row,) = await self._of.of_texts([text])
        best = likeliest(row, 1)[0]
        label, usage = self._of.labels[best], _usage(len(self._of.tokens.whole(text)), 1)
        end = {"index": 0, "finish_reason": "stop", "logprobs": self._told(row, best, asked.told)}
        common = self._common("chatcmpl")
        if not asked.stream:
            ids = {"token_ids": [self._of.vocabulary + best]} if asked.return_token_ids else {}
            choices = [{**end, "message": {"role": "assistant", "content": label}, **ids}]
            more = (
                {} if asked.prompt_logprobs is None else {"prompt_logprobs": self._thought(asked, text, row)}
            )
            return JSONResponse(
                {**common, "object": "chat.completion", "choices": choices, "usage": usage, **more}
            )
        options = asked.stream_options or StreamOptions()
        common |= {"object": "chat.completion.chunk"}
        chunk = {**common, "choices": [{**end, "delta": {"role": "assistant", "content": label}}]}
        if options.continuous_usage_stats:
            chunk["usage"] = usage
        lines = [chunk]
        if options.include_usage:
            lines.append({**common, "choices": [], "usage": usage})
        events = [f"data: {json.dumps(one, ensure_ascii=False)}\n\n" for one in lines]
        return StreamingResponse(iter([*events, "data: [DONE]\n\n"]), media_type="text/event-stream")

    def _thought(self, asked: ChatAsked, text: str, row: NDArray[np.float64]) -> list[Any]:
        """vLLM's ``prompt_logprobs`` of a conversation that ends with a label: nothing of the text's tokens,
        and of the label its log-probability beside the likeliest one's."""
        at = self._label(answered(asked.messages))
        order = likeliest(row, len(row))
        told = {
            str(self._of.vocabulary + one): {
                "logprob": float(row[one]),
                "rank": order.index(one) + 1,
                "decoded_token": self._of.labels[one],
            }
            for one in (at, order[0])
        }
        return [*[None] * len(self._of.tokens.plain(text)), told]

    def _told(self, row: NDArray[np.float64], best: int, top: int | None) -> dict[str, Any] | None:
        if top is None:
            return None

        def shown(at: int) -> dict[str, Any]:
            label = self._of.labels[at]
            return {"token": label, "logprob": float(row[at]), "bytes": list(label.encode())}

        most = len(row) if top < 0 else min(top, MOST_TOLD)
        return {"content": [{**shown(best), "top_logprobs": [shown(at) for at in likeliest(row, most)]}]}

    def _common(self, kind: str) -> dict[str, Any]:
        return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self._name}

    async def completions(self, request: Request) -> Response:
        """What an engine is tried with when it starts, and measured by; a classifier writes no text."""
        asked = await asked_of(request, CompletionAsked)
        label = self._of.labels[likeliest(await self._of.of_ids(asked.prompt), 1)[0]]
        choices = [{"index": 0, "text": label, "finish_reason": "length", "logprobs": None}]
        usage = _usage(len(asked.prompt), 1)
        return JSONResponse(
            {**self._common("cmpl"), "object": "text_completion", "choices": choices, "usage": usage}
        )

    async def tokenize(self, request: Request) -> Response:
        asked = await asked_of(request, TokenizeAsked)
        if asked.messages is not None:
            tokens = self._of.tokens.plain(last_user(asked.messages))
            if (label := answered(asked.messages)) is not None:
                tokens.append(self._of.vocabulary + self._label(label))
        elif asked.prompt is not None:
            tokens = self._of.tokens.plain(asked.prompt)
        else:
            raise BadRequestError("prompt: give a prompt, or messages", "prompt")
        longest = self._of.encoder.longest
        return JSONResponse({"count": len(tokens), "max_model_len": longest, "tokens": tokens})

    def _label(self, text: str | None) -> int:
        """A label's number. Raises BadRequestError."""
        if text not in self._of.labels:
            raise BadRequestError(
                f"messages: {(text or '')[:LONGEST_SHOWN]!r} is none of the {len(self._of.labels)} labels of "
                f"{self._name}",
                "messages",
            )
        return self._of.labels.index(text)

    async def models(self) -> Response:
        one = {"id": self._name, "object": "model", "owned_by": ONNX}
        data = [{**one, "max_model_len": self._of.encoder.longest}]
        return JSONResponse({"object": "list", "data": data})

    async def health(self) -> Response:
        if not self._of.works:
            return PlainTextResponse("nothing is computed any more", 503)
        return PlainTextResponse("draining", 503) if self._draining else Response()

    async def version(self) -> Response:
        return JSONResponse({"version": self._build})

    async def metrics(self) -> Response:
        label, counts = f'{{model_name="{self._name}"}}', self._of.counts
        values = {
            "num_requests_running": counts.running,
            "num_requests_waiting": self._of.waiting,
            "prompt_tokens_total": counts.prompt_tokens,
            "generation_tokens_total": counts.labels,
        }
        return PlainTextResponse("".join(f"vllm:{key}{label} {value}\n" for key, value in values.items()))

    async def account(self) -> Response:
        """What is loaded, in the form of ``engine_site/account_route.py``."""
        rank: dict[str, Any] = {
            "modules": {},
            "quantization": "onnx int8" if self._of.quantized else None,
            "kv_dtypes": [],
            "weight_bytes": self._of.bytes,
            "device_bytes": None,
        }
        return JSONResponse({"version": f"{ONNX} {self._build}", "ranks": [rank]})

    async def describe(self) -> Response:
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        labels = json.dumps(self._of.labels).encode()
        head = hashlib.sha256(labels).hexdigest()[:32]
        width = len(self._of.labels)
        return {"refusal": "", "vocabulary": width, "width": width, "dtype": "float32", "head": head}

    async def score(self, request: Request) -> Response:
        """As ``engine_site/score_route.py``; of a reference its labels' log-probabilities are kept."""
        line, _, kept = (await read_body(request)).partition(b"\n")
        asked, about = ScoreAsked.model_validate_json(line), self._described()
        text, label = asked.tokens[: asked.start], asked.tokens[asked.start :]
        if len(label) != 1 or not 0 <= (at := label[0] - self._of.vocabulary) < about["width"]:
            raise BadRequestError("tokens: one label behind a text is scored", "tokens")
        if kept and (asked.head != about["head"] or len(kept) != 4 * about["width"]):
            raise BadRequestError("head: the reference's figures are of other labels", "head")
        row = await self._of.of_ids(text)
        columns = {
            "came": np.array([row[at]], "<f8"),
            "top1": np.array([row.argmax()], "<i4"),
        }
        if kept:
            before = np.frombuffer(kept, "<f4").astype(np.float64)
            columns["kl"] = np.array([max(0.0, float((np.exp(before) * (before - row)).sum()))], "<f8")
            columns["reference_top1"] = np.array([before.argmax()], "<i4")
        if asked.keep:
            columns["hidden"] = row.astype("<f4")
        raw = {name: values.tobytes() for name, values in columns.items()}
        head = {**about, "columns": [[name, len(one)] for name, one in raw.items()]}
        body = json.dumps(head).encode() + b"\n" + b"".join(raw.values())
        return Response(body, media_type="application/octet-stream")

    async def drain(self, request: Request) -> Response:
        host = request.client.host if request.client else ""
        with contextlib.suppress(ValueError):
            if ip_address(host).is_loopback:
                self._draining = True
                return Response()
        return error_reply(403, "an engine is drained from its own machine alone")


def _usage(read: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
