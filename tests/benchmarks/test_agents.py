"""Agents' traces made smaller: what they have in common stays, who asks is known, what is reported is so."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.agents.aiperf import Answered, ReplayError, read_records, sessions_of
from benchmarks.agents.arrangements import arrangements, configuration
from benchmarks.agents.measure import quantile, routed_by, summary
from benchmarks.agents.report import BEGIN, END, against, put_in, tables, write_report
from benchmarks.agents.traces import (
    AUXILIARY,
    BLOCK,
    CORE,
    Scale,
    read_traces,
    scaled,
    sessions,
    shared_tokens,
    streams,
    traffic,
    window,
    write,
)

REAL = Path(__file__).parents[3] / "shared/data/agent_traces"
SCALE = Scale(prompt=8, answer=4, turns=3, agents=2, agent_turns=2, pace=10.0, longest_thought_s=0.5)
KEPT = SCALE.kept(64)
"""Blocks of 64 tokens that become one."""


class Prompts:
    """Ids of blocks as a recorder of traces gives them: a prompt's prefix that was seen has the same ids."""

    def __init__(self) -> None:
        self._ids: dict[tuple[str, ...], int] = {}

    def ids(self, *parts: tuple[str, int]) -> list[int]:
        """Of a prompt of parts, each a name and how many blocks it has."""
        blocks = [f"{name}{n}" for name, count in parts for n in range(count)]
        prefixes = (tuple(blocks[: n + 1]) for n in range(len(blocks)))
        return [self._ids.setdefault(prefix, len(self._ids) + 1) for prefix in prefixes]


def request(t: float, ids: Sequence[int], out: int = 400, think: float = 2.0) -> dict[str, Any]:
    return {
        "t": t, "type": "n", "model": "a-model", "in": 64 * len(ids) + 5, "out": out, "hash_ids": list(ids),
        "stop": "tool_use", "api_time": 3.0, "think_time": think,
    }  # fmt: skip


def agent(t: float, number: int, kind: str, requests: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "t": t, "type": "subagent", "agent_id": f"agent_{number:03}", "subagent_type": kind,
        "duration_ms": 9000, "total_tokens": 1, "tool_use_count": 1, "status": "completed",
        "requests": requests, "models": ["another"], "tool_tokens": 256, "system_tokens": 128,
    }  # fmt: skip


@pytest.fixture
def trace() -> dict[str, Any]:
    """A session that asks four times and has two sub-agents after its second request."""
    made = Prompts()
    base = ("system", 60)
    explore = ("explorer", 12)
    return {
        "id": "trace_x", "models": ["a-model"], "block_size": 64, "hash_id_scope": "local",
        "tool_tokens": 2000, "system_tokens": 800,
        "requests": [
            request(0.0, made.ids(base)),
            request(20.0, made.ids(base, ("first", 30))),
            agent(25.0, 1, "Explore", [
                request(0.0, made.ids(explore, ("one", 9))),
                request(4.0, made.ids(explore, ("one", 30))),
                request(8.0, made.ids(explore, ("one", 50))),
            ]),
            agent(26.0, 2, "general-purpose", [request(0.0, made.ids(explore, ("two", 20)), out=9000)]),
            request(60.0, made.ids(base, ("first", 30), ("more", 40)), think=40.0),
            request(80.0, made.ids(base, ("first", 30), ("other", 40))),
            request(99.0, made.ids(base)),
        ],
    }  # fmt: skip


def common(one: Sequence[int], other: Sequence[int]) -> int:
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


def pairs_of(trace: dict[str, Any], scale: Scale) -> Iterator[tuple[list[int], list[int], int, int]]:
    """Of any two requests of a window: what is made of both, and how many blocks they had in common."""
    originals = []
    for entry in window(trace["requests"], scale.turns, scale.agents):
        inner = entry["requests"] if entry["type"] == "subagent" else [entry]
        inner = [one for one in inner if one.get("hash_ids")]
        originals += [
            one["hash_ids"] for one in (inner[: scale.agent_turns] if entry["type"] == "subagent" else inner)
        ]
    made = []
    for entry in scaled(trace, scale)["requests"]:
        made += [one["hash_ids"] for one in entry.get("requests", [entry])]
    assert len(made) == len(originals)
    for n, m in itertools.combinations(range(len(made)), 2):
        yield made[n], made[m], common(originals[n], originals[m]), scale.kept(trace["block_size"])


def test_two_prompts_have_in_common_what_they_had_before(trace: dict[str, Any]) -> None:
    seen = 0
    for one, other, before, kept in pairs_of(trace, SCALE):
        assert common(one, other) == min(before // kept, len(one), len(other))
        assert not set(one[common(one, other) :]) & set(other[common(one, other) :])
        seen += common(one, other) > 0
    assert seen >= 5  # the trace has enough in common for this to mean something


def test_a_prompt_has_as_many_ids_as_it_has_whole_blocks(trace: dict[str, Any]) -> None:
    for _, requests in streams(scaled(trace, SCALE)):
        for one in requests:
            assert len(one["hash_ids"]) == one["in"] // BLOCK


def test_the_system_prompt_is_whole_blocks_and_never_the_whole_prompt(trace: dict[str, Any]) -> None:
    made = scaled(trace, SCALE)
    assert (made["tool_tokens"], made["system_tokens"]) == (0, 2800 // 8 // BLOCK * BLOCK)
    trace["system_tokens"] = 10**6
    made = scaled(trace, SCALE)
    assert made["system_tokens"] == (made["requests"][0]["in"] - 1) // BLOCK * BLOCK


def test_lengths_are_divided_and_no_longer_than_is_said(trace: dict[str, Any]) -> None:
    scale = dataclasses.replace(SCALE, longest_prompt=900, longest_answer=120)
    core = next(iter(streams(scaled(trace, scale))))[1]
    assert [one["in"] for one in core] == [(64 * 90 + 5) // 8, 900, 900]
    two = list(streams(scaled(trace, scale)))[2][1]
    assert [one["out"] for one in two] == [120], "9,000 tokens, a fourth of which would be too many"
    assert [one["out"] for one in core] == [100, 100, 100]


def test_a_window_begins_with_the_request_before_the_first_sub_agent(trace: dict[str, Any]) -> None:
    made = scaled(trace, SCALE)
    kinds = [one["type"] for one in made["requests"]]
    assert kinds == ["n", "subagent", "subagent", "n", "n"]
    assert made["requests"][0]["t"] == 0
    assert made["requests"][1]["t"] == pytest.approx(0.5), "5 s later, ten times as fast"


def test_a_trace_without_sub_agents_is_taken_from_its_beginning(trace: dict[str, Any]) -> None:
    trace["requests"] = [one for one in trace["requests"] if one["type"] != "subagent"]
    assert len(scaled(trace, SCALE)["requests"]) == SCALE.turns


def test_a_session_asks_as_core_and_its_sub_agents_as_auxiliary(trace: dict[str, Any]) -> None:
    found = [(role, {one["model"] for one in requests}) for role, requests in streams(scaled(trace, SCALE))]
    assert found == [(CORE, {CORE}), (AUXILIARY, {AUXILIARY}), (AUXILIARY, {AUXILIARY})]


def test_a_sub_agent_that_nobody_knows_is_named(trace: dict[str, Any]) -> None:
    trace["requests"][2]["subagent_type"] = "Dancer"
    with pytest.raises(ValueError, match=r"'Dancer' have no role; known: Explore, Plan, general-purpose"):
        scaled(trace, SCALE)


def test_a_scale_that_makes_no_whole_blocks_is_refused(trace: dict[str, Any]) -> None:
    trace["block_size"] = 128
    with pytest.raises(ValueError, match="take a multiple of 2"):
        scaled(trace, dataclasses.replace(SCALE, prompt=5))


def test_what_somebody_thinks_is_no_longer_than_is_said(trace: dict[str, Any]) -> None:
    core = next(iter(streams(scaled(trace, SCALE))))[1]
    assert [one["think_time"] for one in core] == pytest.approx([0.2, 0.5, 0.2])


def test_a_trace_that_is_taken_twice_is_two_sessions(trace: dict[str, Any], tmp_path: Path) -> None:
    made = sessions([trace], 3, SCALE)
    assert [one["id"] for one in made] == ["trace_x", "trace_x_1", "trace_x_2"]
    (tmp_path / "of-before.json").touch()
    write(made, tmp_path)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["trace_x", "trace_x_1", "trace_x_2"]


def test_what_a_cache_can_have_is_counted_in_the_order_of_requests(trace: dict[str, Any]) -> None:
    made = scaled(trace, SCALE)
    # The second and the third request of the session begin as the first does; the sub-agent's second request
    # begins as its first does, and the other sub-agent's with what both have in common.
    blocks = {CORE: 2 * (90 // KEPT), AUXILIARY: 21 // KEPT + 12 // KEPT}
    assert shared_tokens(made) == {role: BLOCK * count for role, count in blocks.items()}


def test_the_plan_is_told_the_means_of_what_is_asked(trace: dict[str, Any]) -> None:
    found = traffic(sessions([trace], 2, SCALE), 4)
    assert found.sessions == 4
    assert found.roles[CORE].requests == 3
    assert found.roles[AUXILIARY].requests == 3
    assert found.roles[CORE].answer_tokens == 64
    assert found.roles[AUXILIARY].cached_tokens == round(BLOCK * (21 // KEPT + 12 // KEPT) / 3)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real traces are not there ({REAL})")
def test_real_traces_keep_what_they_have_in_common() -> None:
    traces = read_traces(REAL)
    seen = 0
    for trace in traces:
        for one, other, before, kept in pairs_of(trace, Scale()):
            assert common(one, other) == min(before // kept, len(one), len(other)), trace["id"]
            seen += common(one, other) > 0
    assert seen > 100
    roles = {role for one in sessions(traces, len(traces), Scale()) for role, _ in streams(one)}
    assert roles == {CORE, AUXILIARY}


def test_a_folder_without_traces_says_where_they_were_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--traces"):
        read_traces(tmp_path)


def record(session: str, agent_id: str, began: float, ended: float, **changed: Any) -> dict[str, Any]:
    """A line of what AIPerf writes."""
    conversation = f"trace_x::sa:{agent_id}" if agent_id else "trace_x"
    return {
        "metadata": {
            "root_correlation_id": session,
            "conversation_id": conversation,
            "request_start_ns": int(began * 1e9),
            "request_end_ns": int(ended * 1e9),
        },
        "metrics": {
            "time_to_first_token": {"value": 250.0, "unit": "ms"},
            "usage_prompt_tokens": {"value": 100, "unit": "tokens"},
            "usage_prompt_cache_read_tokens": {"value": 64, "unit": "tokens"},
            "usage_completion_tokens": {"value": 8, "unit": "tokens"},
        },
        **changed,
    }


def written(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


def test_a_record_says_whose_it_is_and_how_long_it_took(tmp_path: Path) -> None:
    path = written(tmp_path / "records", record("s", "", 1.0, 3.0), record("s", "agent_001", 3.0, 3.5))
    core, auxiliary = read_records(path)
    assert (core.role, core.first_token_s) == (CORE, 0.25)
    assert core.seconds == pytest.approx(2.0)
    assert (auxiliary.role, auxiliary.agent) == (AUXILIARY, "agent_001")
    assert (core.prompt_tokens, core.cached_tokens, core.answer_tokens) == (100, 64, 8)
    assert sessions_of([core, auxiliary])["s"] == pytest.approx((1.0, 3.5))


def test_a_request_that_failed_is_no_result(tmp_path: Path) -> None:
    failed = record("s", "", 1.0, 2.0, error={"code": 503, "message": "no replica"})
    with pytest.raises(ReplayError, match=r"trace_x failed.*no replica"):
        read_records(written(tmp_path / "records", record("s", "", 0.0, 1.0), failed))


def answered(session: str, agent_id: str, began: float, ended: float) -> Answered:
    return Answered(session, agent_id, began, ended, 0.1, 100, 64, 8)


def test_sessions_per_second_are_those_of_the_whole_replay() -> None:
    found = summary(
        [
            answered("a", "", 0.0, 2.0),
            answered("a", "agent_001", 2.0, 4.0),
            answered("b", "", 1.0, 8.0),
        ]
    )
    assert found["sessions_per_s"] == pytest.approx(2 / 8)
    assert found["session_s"] == {"p50": 4.0, "p95": 7.0}
    assert found["roles"][CORE]["total_s"]["p95"] == 7.0
    assert found["roles"][AUXILIARY]["requests"] == 1


def test_a_quantile_is_a_value_that_was_seen() -> None:
    assert quantile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0
    assert quantile(list(range(1, 101)), 0.95) == 95
    assert quantile([7.0], 0.95) == 7.0


def test_what_answered_is_read_from_the_gateways_metrics() -> None:
    labels = 'role="core",requested="core",model="real",outcome="200"'
    text = (
        "# TYPE tiercel_requests counter\n"
        f'tiercel_requests_total{{{labels},variant="int8"}} 3.0\n'
        f'tiercel_requests_total{{{labels},variant="real:bf16"}} 1.0\n'
    )
    assert routed_by(text) == {(CORE, "int8"): 3, (CORE, "bf16"): 1}


def test_all_arrangements_share_the_same_cache(tmp_path: Path) -> None:
    user = tmp_path / "tiercel.yaml"
    user.write_text(
        "models: {m: {path: model, serve: [bf16, int8]}}\nvariants_dir: v\n"
        "roles: {core: {}, auxiliary: {}}\ndefault_role: core\nengine: {extra_args: [--seed, '1']}\n",
        encoding="utf-8",
    )

    for one in arrangements(("int8",), {CORE: "bf16", AUXILIARY: "int8"}):
        path = configuration(user, one.served, tmp_path / one.name, one.core_bits)
        made = yaml.safe_load(path.read_text())
        engine = made["engine"]
        assert engine["kv_cache_gib"] * len(one.served) == 2, one.name
        assert engine["extra_args"][:2] == ["--seed", "1"]
        assert made["models"]["m"]["path"] == str(tmp_path / "model")
        asked = made["roles"][CORE].get("budget", {}).get("min_weight_bits")
        assert asked == (16 if one.name == "tiercel-pools" else None), "as the static rule has it"


def document(*rates: tuple[str, int, float]) -> dict[str, Any]:
    def role(p95: float) -> dict[str, Any]:
        times = {"mean": p95, "p50": p95 / 2, "p95": p95}
        return {"requests": 3, "ttft_s": times, "total_s": times, "prompt_tokens": 100, "cached_tokens": 50,
                "answer_tokens": 9}  # fmt: skip

    results = [
        {
            "arrangement": name, "repeat": repeat, "sessions": 2, "makespan_s": 2 / rate,
            "sessions_per_s": rate, "session_s": {"p50": 1.0, "p95": 2.0},
            "roles": {CORE: role(1 / rate), AUXILIARY: role(0.5)},
            "cache_hit_rate": 0.5, "cpu_s": {"engines": 9.0, "door": 1.0}, "memory_bytes": {"bf16": 10**9},
            "served": {CORE: {"bf16": 3}, AUXILIARY: {"bf16": 1, "int8": 2}}, "replay_s": 9.0,
            "doubt": "",
        }
        for name, repeat, rate in rates
    ]  # fmt: skip
    quality = {"kl": 0.01, "first_choice_agreement": 0.96, "outcome": "passed", "reasons": []}
    asked = {"requests": 3.0, "prompt_tokens": 90.0, "cached_tokens": 40.0, "answer_tokens": 8.0}
    return {
        "sessions": 2, "at_once": 1, "requests": 6, "titles": {"bf16": "one engine", "tiercel": "Tiercel"},
        "traffic": {"roles": {CORE: asked, AUXILIARY: asked}}, "results": results,
        "quality": {"int8": {CORE: quality}},
        "plan": [{"served": ["int8"], "sessions_per_s": 1.0, "latency_s": {CORE: 1.0, AUXILIARY: 0.5}}],
    }  # fmt: skip


def test_arrangements_are_compared_within_a_repeat() -> None:
    one = document(("bf16", 0, 1.0), ("tiercel", 0, 2.0), ("bf16", 1, 2.0), ("tiercel", 1, 3.0))
    found = against(one, "bf16")
    assert found["tiercel"]["sessions/s"] == [2.0, 1.5]
    assert found["tiercel"]["core p95"] == [pytest.approx(0.5), pytest.approx(2 / 3)]


def test_the_tables_stand_between_the_marks_of_the_document() -> None:
    text = tables(document(("bf16", 0, 1.0), ("tiercel", 0, 2.0)))
    assert "| Tiercel ÷ one engine | 2.00 | 0.50 | 0.50 | 0.50 | 1.00 | 1.00 | 1.00 |" in text
    assert "`bf16` 33 %, `int8` 67 %" in text
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert put_in(put_in(page, "newer"), text) == f"before\n{BEGIN}\n\n{text}\n\n{END}\nafter\n"
    with pytest.raises(ValueError, match="results"):
        put_in("no marks", text)


def test_the_picture_is_drawn_and_the_document_shows_it(tmp_path: Path) -> None:
    page, picture = tmp_path / "docs/page.md", tmp_path / "images/p.png"
    page.parent.mkdir()
    page.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    one = document(("bf16", 0, 1.0), ("tiercel", 0, 2.0), ("bf16", 1, 1.1), ("tiercel", 1, 2.1))
    write_report(one, page, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "(../images/p.png)" in page.read_text(encoding="utf-8")
