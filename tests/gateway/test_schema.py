"""The application's OpenAPI document is true: schemathesis asks every operation things nobody thought of."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from gateway_stack import running_gateway

LEFT_OUT = ("/admin/config",)
"""Its body is a YAML file, and is judged by what it means: no schema can say what is refused."""


async def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    async with running_gateway(run_dir=tmp_path) as stack:
        # What a schema allows may still mean nothing here: a variant that is not served.
        excluded = ["--exclude-checks", "positive_data_acceptance"]
        options = [*excluded, "--max-examples", "10", "--seed", "1", "--no-color", "--phases"]
        phases = "examples,coverage,fuzzing"
        left_out = [word for path in LEFT_OUT for word in ("--exclude-path", path)]
        run = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "ignore", "-m", "schemathesis.cli", "run"),
            *(stack.url + "/openapi.json", *options, phases, *left_out),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await run.communicate()
    assert run.returncode == 0, said.decode()[-6000:]
