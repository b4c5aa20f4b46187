"""One exported classifier, served by onnxruntime: ``python -m deploy.encoder.serve --directory DIR --port
PORT``. ``tiercel up`` starts it for variants whose target is ``onnxruntime``."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import os
import sys
from pathlib import Path

import uvicorn

from deploy.encoder.api import make_app
from deploy.encoder.classifier import Classifier
from quantize.export.types import ExportError


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deploy.encoder.serve", description="Serves a classifier.")
    parser.add_argument("--directory", type=Path, required=True, help="of an exported classifier")
    parser.add_argument("--name", help="what requests call it (default: the directory's name)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--stop-timeout", type=int, default=20, help="seconds, to finish what has begun")
    return parser


async def serve(options: argparse.Namespace) -> None:
    """Until it is told to stop. Raises ExportError."""
    classifier = Classifier(options.directory, options.threads)
    classifier.start()
    name = options.name or options.directory.name
    app = make_app(classifier, name, importlib.metadata.version("onnxruntime"))
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        timeout_graceful_shutdown=options.stop_timeout,
    )
    try:
        await uvicorn.Server(config).serve()
    finally:
        await classifier.stop()


def main() -> None:
    options = arguments().parse_args()
    try:
        asyncio.run(serve(options))
    except ExportError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
