"""One GGUF file, served by llama.cpp: ``python -m deploy.llama.serve --model FILE --port PORT``.

``tiercel up`` starts it for variants whose target is ``llama.cpp``. It listens before it is asked anything,
and ends on SIGTERM when what it has begun is finished, within ``--stop-timeout``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

import uvicorn

from deploy.llama.api import make_app
from deploy.llama.engine import Engine
from deploy.llama.server import Server
from deploy.llama.template import ChatTemplate
from quantize.core.companions import chat_template, read_object
from quantize.core.weights import CheckpointError
from quantize.export.gguf_file import read_gguf
from quantize.export.llama import LlamaError, LlamaModel
from quantize.export.types import ExportError

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
REFERENCE = "TIERCEL_REFERENCE"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deploy.llama.serve", description="Serves a GGUF file.")
    parser.add_argument("--model", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--name", help="what requests call it (default: the file's name)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--context", type=int, help="tokens of the longest request (default: the model's)")
    parser.add_argument(
        "--cache-tokens", type=int, help="tokens of the KV cache (default: one longest request)"
    )
    parser.add_argument("--slots", type=int, default=4, help="answers at a time")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--stop-timeout", type=int, default=20, help="seconds, to finish what has begun")
    return parser


def make_server(options: argparse.Namespace) -> Server:
    """Load the file. Raises LlamaError and ExportError."""
    file = read_gguf(options.model)
    model = LlamaModel(options.model)
    context = min(options.context or model.trained_context, model.trained_context)
    cache = max(options.cache_tokens or context, context)
    engine = Engine(model, cache, options.slots, options.threads, on_end=_end_process)
    beside = options.model.parent
    try:
        text = chat_template(beside) or model.chat_template()
    except CheckpointError:
        text = model.chat_template()
    names = {
        f"{name}_token": model.piece(token, special=True).decode(errors="replace")
        for name, token in (("bos", model.bos), ("eos", model.eos))
        if token >= 0
    }
    generation = read_object(beside / "generation_config.json")
    reference = os.environ.get(REFERENCE)
    return Server(
        engine=engine,
        file=file,
        name=options.name or options.model.stem,
        context=context,
        template=ChatTemplate(text, names) if text else None,
        defaults={name: generation[name] for name in SAMPLING_DEFAULTS if generation.get(name) is not None},
        reference=Path(reference) if reference else None,
    )


def _end_process() -> None:
    """So that whoever started it starts it again: it would answer nothing any more."""
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    options = arguments().parse_args()
    try:
        server = make_server(options)
    except (LlamaError, ExportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    server.engine.start()
    try:
        uvicorn.run(
            make_app(server),
            host=options.host,
            port=options.port,
            log_level="warning",
            timeout_graceful_shutdown=options.stop_timeout,
        )
    finally:
        server.engine.stop()
        server.engine.model.close()
    if server.engine.broken is not None:
        sys.exit(f"the engine has ended: {server.engine.broken!r}")


if __name__ == "__main__":
    main()
