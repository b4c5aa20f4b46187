"""AIPerf replays a session with sub-agents through the gateway: who asked, as what, and in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gateway_stack import by_id, make_card, running_gateway
from tokenizers import Tokenizer

from benchmarks.agents.aiperf import replay
from benchmarks.agents.traces import AUXILIARY, BLOCK, CORE, write
from benchmarks.gateway.peers import ROOT, WORK

MADE = WORK / "env/aiperf/.ready"
pytestmark = pytest.mark.skipif(
    not MADE.exists(),
    reason="AIPerf's environment is not there; python -m benchmarks.agents.aiperf makes it",
)


def request(t: float, role: str, ids: list[int]) -> dict[str, Any]:
    return {
        "t": t, "type": "n", "model": role, "in": BLOCK * len(ids), "out": 3, "hash_ids": ids, "stop": "",
        "api_time": 0.1, "think_time": 0.0,
    }  # fmt: skip


SESSION = {
    "id": "trace_x", "models": [CORE, AUXILIARY], "block_size": BLOCK, "hash_id_scope": "local",
    "tool_tokens": 0, "system_tokens": 0,
    "requests": [
        request(0.0, CORE, [1, 2]),
        {
            "t": 0.2, "type": "subagent", "agent_id": "agent_001", "subagent_type": "Explore",
            "status": "completed", "models": [AUXILIARY], "tool_tokens": 0, "system_tokens": 0,
            "requests": [request(0.0, AUXILIARY, [7]), request(0.2, AUXILIARY, [7, 8])],
        },
        request(0.8, CORE, [1, 2, 3]),
    ],
}  # fmt: skip


async def test_sub_agents_ask_in_their_role_and_their_session_waits_for_them(tmp_path: Path) -> None:
    write([SESSION], tmp_path / "traces")
    int8 = make_card("int8", passes=(AUXILIARY,), weight_bits=8, weight_bytes=5_000_000)
    own = {"roles": {CORE: {}, AUXILIARY: {}}, "serve": ("bf16", "int8")}
    async with running_gateway(cards=by_id(make_card("bf16"), int8), **own) as stack:
        model = ROOT / "deploy/assistant/model"
        answers = await replay(stack.url, tmp_path / "traces", tmp_path / "out", model, 1, 1)
        core, auxiliary = stack.asked("bf16"), stack.asked("int8")
    assert (len(core), len(auxiliary)) == (2, 2), "the session's own went to bf16, the sub-agent's to int8"

    order = [one.role for one in sorted(answers, key=lambda one: one.began)]
    assert order == [CORE, AUXILIARY, AUXILIARY, CORE]
    first, *_, last = sorted(answers, key=lambda one: one.began)
    assert last.began >= max(one.ended for one in answers if one.role == AUXILIARY) - 0.01
    assert {one.session for one in answers} == {first.session}

    words = Tokenizer.from_file(str(model / "tokenizer.json"))
    for asked, wanted in ((core[0], 2), (core[1], 3), (auxiliary[1], 2)):
        said = sum(len(words.encode(message["content"]).ids) for message in asked["messages"])
        assert said == pytest.approx(BLOCK * wanted, rel=0.15), "as long as the trace says"

    texts = [[message["content"] for message in one["messages"]] for one in core]
    assert texts[1][: len(texts[0])] == texts[0], "a prompt that has another's blocks has its words"
