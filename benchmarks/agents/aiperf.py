"""AIPerf, which replays traces with sub-agents: its environment, its command, and what it has written down.

It reads the traces' own format (``weka_trace``): a session is a conversation, a sub-agent one of its own that
its session waits for, prompts are words made from the blocks' ids. It sends a request to the model that the
request names, and with it the conversation's id, and the parent's of a sub-agent's. That format has no
headers per request, so the role of a request is its ``model``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.agents.traces import AUXILIARY, CORE
from benchmarks.gateway.peers import environment

REQUIREMENTS = ("aiperf==0.13.0",)
RECORDS = "profile_export.jsonl"
PATIENCE_S = 900.0
SETTINGS = {
    # A sub-agent is one conversation, however its requests overlap.
    "AIPERF_DATASET_WEKA_SPLIT_FLATTENED_AGENTS": "false",
    "AIPERF_HTTP_X_SESSION_ID_FROM_CORRELATION_ID": "true",
    "AIPERF_HTTP_X_DYNAMO_SESSION_ID_FROM_CORRELATION_ID": "true",
}


class ReplayError(RuntimeError):
    """AIPerf did not replay what it was given. The text says what it said, and where its log is."""


@dataclass(frozen=True)
class Answered:
    """One answer; times in seconds, those of day by a clock of AIPerf's."""

    session: str
    """The root conversation's id, which its sub-agents share."""
    agent: str
    """Of a sub-agent; empty for the session itself."""
    began: float
    ended: float
    first_token_s: float
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int

    @property
    def role(self) -> str:
        return AUXILIARY if self.agent else CORE

    @property
    def seconds(self) -> float:
        return self.ended - self.began


def command(url: str, traces: Path, out: Path, tokenizer: Path, sessions: int, at_once: int) -> list[str]:
    """``at_once`` sessions at a time, until all have ended; every answer has its full length."""
    python = environment("aiperf", REQUIREMENTS) / "bin/python"
    shutil.rmtree(out, ignore_errors=True)  # what an earlier replay has left there is none of this one's
    out.mkdir(parents=True)
    return [
        str(python), "-m", "aiperf", "profile",
        "--model", CORE, "--model", AUXILIARY,  # the first is the one of a session's own requests
        "--url", url, "--endpoint-type", "chat", "--streaming", "--use-legacy-max-tokens",
        "--input-file", str(traces.resolve()), "--custom-dataset-type", "weka_trace",
        "--num-sessions", str(sessions), "--concurrency", str(at_once),
        "--no-fixed-schedule", "--use-think-time-only",
        "--tokenizer", str(tokenizer.resolve()), "--use-server-token-count",
        "--extra-inputs", '{"ignore_eos": true, "temperature": 0}',
        "--random-seed", "1", "--export-level", "records", "--artifact-dir", str(out.resolve()),
        "--ui", "none", "--no-gpu-telemetry", "--no-server-metrics",
        "--workers-max", "1", "--record-processors", "1",  # they share the cores with the engines
    ]  # fmt: skip


async def replay(
    url: str, traces: Path, out: Path, tokenizer: Path, sessions: int, at_once: int
) -> list[Answered]:
    """Until all sessions have ended. Raises ReplayError where one of them was not answered."""
    said = out / "said.log"
    wanted = await asyncio.to_thread(command, url, traces, out, tokenizer, sessions, at_once)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with said.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *wanted, env={**kept, **SETTINGS}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        status = await asyncio.wait_for(process.wait(), PATIENCE_S)
    finally:
        # Whatever it has left, also where nobody waits any more.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if status != 0 or not (out / RECORDS).exists():
        last = said.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        raise ReplayError(f"AIPerf ended with status {status} ({said}):\n" + "\n".join(last))
    return read_records(out / RECORDS)


def read_records(path: Path) -> list[Answered]:
    """Raises ReplayError for a request that was not answered."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    for one in found:
        if error := one.get("error"):
            where = one["metadata"]["conversation_id"]
            raise ReplayError(f"{path}: a request of {where} failed: {json.dumps(error)[:300]}")
    return [_answered(one["metadata"], one["metrics"]) for one in found]


def _answered(metadata: dict[str, Any], metrics: dict[str, Any]) -> Answered:
    def value(*names: str) -> float:
        return next((float(metrics[name]["value"]) for name in names if name in metrics), 0.0)

    return Answered(
        session=metadata["root_correlation_id"],
        agent=metadata["conversation_id"].partition("::sa:")[2],
        began=metadata["request_start_ns"] / 1e9,
        ended=metadata["request_end_ns"] / 1e9,
        first_token_s=value("time_to_first_token") / 1e3,
        prompt_tokens=round(value("usage_prompt_tokens")),
        cached_tokens=round(value("usage_prompt_cache_read_tokens")),
        answer_tokens=round(value("usage_completion_tokens")),
    )


def sessions_of(answers: Sequence[Answered]) -> dict[str, tuple[float, float]]:
    """When each session began and ended, its sub-agents included."""
    found: dict[str, tuple[float, float]] = {}
    for one in answers:
        began, ended = found.get(one.session, (one.began, one.ended))
        found[one.session] = (min(began, one.began), max(ended, one.ended))
    return found


def main() -> None:
    """Make the environment."""
    print(environment("aiperf", REQUIREMENTS))


if __name__ == "__main__":
    main()
