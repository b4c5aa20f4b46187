"""``python -m gateway.upstream.fake --port 8101``."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from gateway.upstream.fake import Account, FakeEngine, Script


async def serve_forever(engine: FakeEngine, port: int) -> None:
    async with engine.serving(port) as url:
        print(f"fake engine at {url}", flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for a vLLM engine.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--text", default=Script.text, help="what it answers")
    parser.add_argument("--token-delay", type=float, default=0.02, help="seconds between tokens")
    parser.add_argument("--account", type=Path, help="file that keeps what it did")
    options = parser.parse_args()
    script = Script(text=options.text, token_delay_s=options.token_delay)
    asyncio.run(serve_forever(FakeEngine(script, Account(options.account)), options.port))


if __name__ == "__main__":
    main()
