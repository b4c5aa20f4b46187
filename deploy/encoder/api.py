"""The routes: ``/classify`` as vLLM has it, chat in which the label is answered, and what the gateway and the
evaluator ask of an engine (as of ``deploy/llama``).

To the evaluator a conversation's tokens are those of its last user message, and an answer that is a label is
one token behind them, with an id after those of words.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from deploy.encoder.classifier import Classifier, FullError, likeliest
from quantize.export.encoder_variant import ONNX

MOST_TOLD = 20


class RefusedError(Exception):
    """A request that is not served. ``field`` is the one that is at fault."""

    def __init__(self, text: str, field: str) -> None:
        super().__init__(text)
        self.field = field


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
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(FullError, _full)
    return app


def _error(status: int, text: str, field: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": text, "type": kind, "param": field, "code": None}}, status)


async def _refused(_: Request, error: Exception) -> Response:
    return _error(400, str(error), getattr(error, "field", None))


async def _full(_: Request, error: Exception) -> Response:
    answer = _error(503, f"{error}; ask again in a moment")
    answer.headers["retry-after"] = "1"
    return answer


class Routes:
    def __init__(self, classifier: Classifier, name: str, build: str) -> None:
        self._of, self._name, self._build = classifier, name, build
        self._draining = False

    async def classify(self, request: Request) -> Response:
        asked = await _body(request)
        texts = asked.get("input")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(one, str) for one in texts):
            raise RefusedError("input: a text, or a list of texts", "input")
        rows = [np.exp(await self._of.log_probabilities(text)) for text in texts]
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
        asked = await _body(request)
        text = _last_user(asked.get("messages"))
        row = await self._of.log_probabilities(text)
        best = likeliest(row, 1)[0]
        label, read = self._of.labels[best], len(self._of.tokens.whole(text))
        told = self._told(row, best, int(asked.get("top_logprobs") or 0)) if asked.get("logprobs") else None
        end = {"index": 0, "finish_reason": "stop", "logprobs": told}
        if not asked.get("stream"):
            message = {"role": "assistant", "content": label}
            ids = {"token_ids": [self._of.vocabulary + best]} if asked.get("return_token_ids") else {}
            choices = [{**end, "message": message, **ids}]
            return JSONResponse(
                {
                    **self._common("chatcmpl"),
                    "object": "chat.completion",
                    "choices": choices,
                    "usage": _usage(read, 1),
                }
            )
        options = asked.get("stream_options") or {}
        common = {**self._common("chatcmpl"), "object": "chat.completion.chunk"}
        chunk = {**common, "choices": [{**end, "delta": {"role": "assistant", "content": label}}]}
        if options.get("continuous_usage_stats"):
            chunk["usage"] = _usage(read, 1)
        lines = [chunk]
        if options.get("include_usage"):
            lines.append({**common, "choices": [], "usage": _usage(read, 1)})
        events = [f"data: {json.dumps(one, ensure_ascii=False)}\n\n" for one in lines]
        return StreamingResponse(iter([*events, "data: [DONE]\n\n"]), media_type="text/event-stream")

    def _told(self, row: Any, best: int, top: int) -> dict[str, Any]:
        def shown(at: int) -> dict[str, Any]:
            label = self._of.labels[at]
            return {"token": label, "logprob": float(row[at]), "bytes": list(label.encode())}

        most = len(row) if top < 0 else min(top, MOST_TOLD)
        return {"content": [{**shown(best), "top_logprobs": [shown(at) for at in likeliest(row, most)]}]}

    def _common(self, kind: str) -> dict[str, Any]:
        return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self._name}

    async def completions(self, request: Request) -> Response:
        """What an engine is tried with when it starts; a classifier writes no text otherwise."""
        asked = await _body(request)
        if asked.get("max_tokens") != 1 or not isinstance(asked.get("prompt"), list):
            raise RefusedError("prompt: a classifier answers chat and /classify; it writes no text", "prompt")
        row = await self._of.log_probabilities(self._of.tokens.text(asked["prompt"]))
        label = self._of.labels[likeliest(row, 1)[0]]
        choices = [{"index": 0, "text": label, "finish_reason": "length", "logprobs": None}]
        read = len(asked["prompt"])
        return JSONResponse(
            {
                **self._common("cmpl"),
                "object": "text_completion",
                "choices": choices,
                "usage": _usage(read, 1),
            }
        )

    async def tokenize(self, request: Request) -> Response:
        asked = await _body(request)
        messages = asked.get("messages")
        if messages is None:
            tokens = self._of.tokens.plain(str(asked.get("prompt") or ""))
        else:
            tokens = self._of.tokens.plain(_last_user(messages))
            if messages[-1].get("role") == "assistant":
                tokens.append(self._label(str(messages[-1].get("content"))))
        longest = self._of.encoder.longest
        return JSONResponse({"count": len(tokens), "max_model_len": longest, "tokens": tokens})

    def _label(self, text: str) -> int:
        if text not in self._of.labels:
            raise RefusedError(
                f"messages: {text[:60]!r} is none of the {len(self._of.labels)} labels of {self._name}",
                "messages",
            )
        return self._of.vocabulary + self._of.labels.index(text)

    async def models(self) -> Response:
        one = {"id": self._name, "object": "model", "owned_by": ONNX}
        data = [{**one, "max_model_len": self._of.encoder.longest}]
        return JSONResponse({"object": "list", "data": data})

    async def health(self) -> Response:
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
        line, _, kept = (await request.body()).partition(b"\n")
        asked, about = json.loads(line), self._described()
        tokens, start = asked["tokens"], asked["start"]
        if len(tokens) - start != 1 or not 0 <= tokens[start] - self._of.vocabulary < about["width"]:
            raise RefusedError("tokens: one label behind a text is scored", "tokens")
        if kept and (asked.get("head") != about["head"] or len(kept) != 4 * about["width"]):
            raise RefusedError("the reference's figures are of other labels", "head")
        row = await self._of.log_probabilities(self._of.tokens.text(tokens[:start]))
        columns = {
            "came": np.array([row[tokens[start] - self._of.vocabulary]], "<f8"),
            "top1": np.array([row.argmax()], "<i4"),
        }
        if kept:
            before = np.frombuffer(kept, "<f4").astype(np.float64)
            columns["kl"] = np.array([max(0.0, float((np.exp(before) * (before - row)).sum()))], "<f8")
            columns["reference_top1"] = np.array([before.argmax()], "<i4")
        if asked.get("keep"):
            columns["hidden"] = row.astype("<f4")
        raw = {name: values.tobytes() for name, values in columns.items()}
        head = {**about, "columns": [[name, len(one)] for name, one in raw.items()]}
        body = json.dumps(head).encode() + b"\n" + b"".join(raw.values())
        return Response(body, media_type="application/octet-stream")

    async def drain(self, request: Request) -> Response:
        host = request.client.host if request.client else ""
        if host and ip_address(host).is_loopback:
            self._draining = True
            return Response()
        return _error(403, "an engine is drained from its own machine alone")


def _usage(read: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _last_user(messages: Any) -> str:
    """The text of the last user's message. Raises RefusedError."""
    if isinstance(messages, Sequence):
        for message in reversed(messages):
            if isinstance(message, Mapping) and message.get("role") == "user":
                content = message.get("content")
                if isinstance(content, list):
                    parts = [part.get("text") for part in content if isinstance(part, Mapping)]
                    content = "\n".join(part for part in parts if isinstance(part, str))
                if isinstance(content, str) and content.strip():
                    return content
    raise RefusedError("messages: a classifier reads the last user's message, and there is none", "messages")


async def _body(request: Request) -> dict[str, Any]:
    try:
        found = json.loads(await request.body())
    except ValueError:
        raise RefusedError("the body is not JSON", "body") from None
    if not isinstance(found, dict):
        raise RefusedError("the body is no JSON object", "body")
    return found
