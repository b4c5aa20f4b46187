"""The fleet plan: speeds to predictions, predictions to a choice, on machines that are made up."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from deploy.fleet.layouts import BESIDE_CORES, Candidate, layouts
from deploy.fleet.lengths import DECK, Lengths
from deploy.fleet.plan import Target, rank
from deploy.fleet.predict import MPS_GAIN, Device, PoolLoad, predict
from deploy.fleet.speed import EngineSpeed, fit
from deploy.fleet.traffic import RoleTraffic, Traffic, TrafficError, read_traffic, traffic_from_metrics
from deploy.placement import GIB, Gpu, Machine, Need
from quantize.core.engine_figures import SpeedPoint

SLOW = EngineSpeed(0.05, 0.002, 0.0, 2e-3, 0.0)
FAST = EngineSpeed(0.02, 0.002, 0.0, 1e-3, 0.0)
SHORT = RoleTraffic(requests=2, prompt_tokens=100, answer_tokens=8)
LONG = RoleTraffic(requests=1, prompt_tokens=400, answer_tokens=60)
TRAFFIC = Traffic(roles={"intent": SHORT, "core": LONG}, sessions=6)
WITH_JUDGE = Traffic(roles={**TRAFFIC.roles, "judge": SHORT}, sessions=6)
TWO_CORES = Machine({0: (0, 1)}, 16 * GIB)


def pool(name: str, speed: EngineSpeed, roles: Mapping[str, RoleTraffic], most: int = 64) -> PoolLoad:
    return PoolLoad(name, speed, roles, most)


def candidate(name: str, speed: EngineSpeed, weight_bytes: int = GIB) -> Candidate:
    return Candidate(name, Need(name, weight_bytes, GIB), speed, 20_000, 64)


def test_the_law_is_found_again_from_points_that_obey_it() -> None:
    true = EngineSpeed(0.02, 1e-3, 4e-6, 3e-4, 2e-7)
    points = [
        SpeedPoint(
            together=n,
            prompt_tokens=p,
            answer_tokens=24,
            prompt_s=0.02 + n * true.prompt_s(p),
            step_s=true.step_s(n, n * (p + 12)),
        )
        for n, p in ((1, 128), (8, 128), (16, 128), (4, 512))
    ]
    assert dataclasses.astuple(fit(points)) == pytest.approx(dataclasses.astuple(true), rel=1e-6)


def test_no_law_has_a_negative_part_however_the_points_lie() -> None:
    points = [
        SpeedPoint(together=n, prompt_tokens=p, answer_tokens=24, prompt_s=t, step_s=s)
        for n, p, t, s in ((1, 128, 0.9, 0.05), (8, 128, 1.0, 0.03), (4, 512, 0.8, 0.02))
    ]
    found = fit(points)
    assert min(dataclasses.astuple(found)) >= 0
    assert found.step_s(1, 128) > 0


def test_lengths_have_the_wanted_mean_in_every_deck_and_differ() -> None:
    lengths = Lengths(random.Random(1))
    drawn = [lengths.draw("answer", 1000) for _ in range(2 * DECK)]
    for deck in (drawn[:DECK], drawn[DECK:]):
        assert sum(deck) / DECK == pytest.approx(1000, rel=0.01)
        assert max(deck) > 10 * min(deck)
    assert drawn[:DECK] != drawn[DECK:]


def test_one_session_takes_as_long_as_the_law_says() -> None:
    one = Traffic(roles={"core": LONG}, sessions=1, pause_s=2.0)
    found = predict([Device("core 0", (pool("m:bf16", SLOW, one.roles),))], one)
    first = SLOW.step + SLOW.prompt_s(LONG.new_tokens)
    alone = first + (LONG.answer_tokens - 1) * SLOW.step_s(1, 0)
    assert found.latencies["core"].first_token_s == pytest.approx(first, rel=0.02)
    assert found.latencies["core"].total_s == pytest.approx(alone, rel=0.02)
    assert found.session_s == pytest.approx(2.0 + alone, rel=0.02)
    assert found.sessions_per_s == pytest.approx(1 / (2.0 + alone), rel=0.02)
    assert found.busy["core 0"] == pytest.approx(alone / (2.0 + alone), rel=0.02)


def test_many_sessions_fill_the_slowest_device() -> None:
    traffic = TRAFFIC.model_copy(update={"sessions": 200})
    devices = [
        Device("core 0", (pool("m:bf16", SLOW, {"core": LONG}, most=8),)),
        Device("core 1", (pool("m:int8", FAST, {"intent": SHORT}),)),
    ]
    found = predict(devices, traffic)
    # Each request is in so many steps, which it shares with seven others.
    each = SLOW.prompt_s(400) + (LONG.answer_tokens + 1) * SLOW.step / 8 + LONG.answer_tokens * SLOW.answer
    assert found.sessions_per_s == pytest.approx(1 / each, rel=0.05)
    assert found.busy["core 0"] == pytest.approx(1.0, abs=0.01)
    assert found.busy["core 1"] < 0.9


def test_what_a_session_asks_comes_as_often_as_it_should() -> None:
    """Of a gateway's metrics a session is one request of a mixture."""
    parts = {"a": 0.5, "b": 0.3, "c": 0.2}
    roles = {name: SHORT.model_copy(update={"requests": share}) for name, share in parts.items()}
    mixture = Traffic(roles=roles, sessions=1)
    whole = Traffic(roles={"a": SHORT.model_copy(update={"requests": 1})}, sessions=1)
    found = predict([Device("core 0", (pool("m:int8", FAST, mixture.roles),))], mixture)
    same = predict([Device("core 0", (pool("m:int8", FAST, whole.roles),))], whole)
    assert found.sessions_per_s == pytest.approx(same.sessions_per_s, rel=0.02)


def test_a_prediction_is_the_same_every_time() -> None:
    devices = [Device("core 0", (pool("m:bf16", SLOW, TRAFFIC.roles),))]
    assert predict(devices, TRAFFIC) == predict(devices, TRAFFIC)


def test_tokens_out_of_the_cache_cost_attention_alone() -> None:
    cached = LONG.model_copy(update={"cached_tokens": 350})
    rates = [
        predict([Device("core 0", (pool("m:bf16", SLOW, {"core": one}),))], Traffic(roles={"core": one}))
        for one in (LONG, cached)
    ]
    assert rates[1].latencies["core"].first_token_s < 0.5 * rates[0].latencies["core"].first_token_s
    assert SLOW.prompt_s(50, 350) == pytest.approx(50 * SLOW.prompt)


def test_two_engines_that_take_turns_on_a_gpu_lose_to_one() -> None:
    """As was measured: a batch that is split over two engines reads weights twice."""
    same = EngineSpeed(0.01, 1e-4, 0.0, 2e-5, 0.0)
    both = (pool("m:bf16", same, {"core": LONG}), pool("m:int8", same, {"intent": SHORT}))
    traffic = TRAFFIC.model_copy(update={"sessions": 32})
    one = predict([Device("GPU 0", (pool("m:bf16", same, TRAFFIC.roles),))], traffic).sessions_per_s
    turns = predict([Device("GPU 0", both)], traffic).sessions_per_s
    at_once = predict([Device("GPU 0", both, MPS_GAIN)], traffic).sessions_per_s
    assert turns < one
    assert turns < at_once


def test_a_cache_that_holds_few_requests_limits_the_batch() -> None:
    traffic = Traffic(roles={"core": LONG}, sessions=32)
    rates = [
        predict([Device("GPU 0", (pool("m:bf16", FAST, traffic.roles, most),))], traffic).sessions_per_s
        for most in (1, 4, 64)
    ]
    assert rates == sorted(rates)
    assert rates[0] < 0.8 * rates[2]


LADDERS = {"intent": ("m:int4", "m:int8", "m:bf16"), "core": ("m:int8", "m:bf16")}
CANDIDATES = {
    one.id: one for one in (candidate("m:bf16", SLOW), candidate("m:int8", FAST), candidate("m:int4", FAST))
}


def test_engines_on_all_cores_leave_some_of_them_to_the_other_processes() -> None:
    def shares(machine: Machine) -> dict[tuple[str, ...], float]:
        found, _ = layouts(CANDIDATES, LADDERS, {}, machine, TRAFFIC)
        return {one.served: min(device.share for device in one.devices) for one in found}

    two, four = shares(TWO_CORES), shares(Machine({0: (0, 1, 2, 3)}, 16 * GIB))
    assert two["m:int8",] == 1.0
    assert two["m:bf16", "m:int4"] == pytest.approx(1 - 2 * BESIDE_CORES / 2)
    assert four["m:bf16", "m:int4"] > 0.94
    slowed = Device("core 0", (pool("m:bf16", SLOW, TRAFFIC.roles),), share=0.5)
    whole = Device("core 0", (pool("m:bf16", SLOW, TRAFFIC.roles),))
    ratio = predict([slowed], TRAFFIC).sessions_per_s / predict([whole], TRAFFIC).sessions_per_s
    assert ratio == pytest.approx(0.5, rel=0.02)


def test_layouts_serve_every_role_and_nothing_that_nobody_gets() -> None:
    found, refused = layouts(CANDIDATES, LADDERS, {}, TWO_CORES, TRAFFIC)
    assert not refused
    assert {one.served for one in found} == {
        ("m:bf16",),
        ("m:int8",),
        ("m:bf16", "m:int4"),
        ("m:int8", "m:int4"),
    }
    both = next(one for one in found if one.served == ("m:int8", "m:int4"))
    assert both.serves == {"intent": "m:int4", "core": "m:int8"}
    assert len(both.devices) == 2, "each engine has a core of its own"


def test_a_reference_that_the_watch_asks_is_served_beside_its_variants() -> None:
    beside = {"m:int8": "m:bf16", "m:int4": "m:bf16"}
    found, _ = layouts(CANDIDATES, LADDERS, beside, TWO_CORES, TRAFFIC)
    assert {one.served for one in found} == {
        ("m:bf16",),
        ("m:bf16", "m:int8"),
        ("m:bf16", "m:int4"),
        ("m:bf16", "m:int8", "m:int4"),
    }


def test_engines_that_share_cores_are_one_device() -> None:
    found, _ = layouts(CANDIDATES, {**LADDERS, "judge": ("m:bf16",)}, {}, TWO_CORES, WITH_JUDGE)
    three = next(one for one in found if len(one.served) == 3)
    assert sorted(len(device.pools) for device in three.devices) == [1, 2]


def test_what_does_not_fit_is_said() -> None:
    large = {"m:bf16": candidate("m:bf16", SLOW, 20 * GIB), "m:int8": candidate("m:int8", FAST, 10 * GIB)}
    card = Machine({0: (0, 1)}, 64 * GIB, (Gpu(0, "A card", 24 * GIB, 24 * GIB),))
    ladders = {"intent": ("m:int8", "m:bf16"), "core": ("m:bf16",)}
    found, refused = layouts(large, ladders, {}, card, TRAFFIC)
    assert [one.served for one in found] == [("m:bf16",)]
    assert list(refused) == [("m:bf16", "m:int8")]
    assert "do not fit on this machine side by side" in refused["m:bf16", "m:int8"]


def test_the_fastest_layout_is_chosen_and_the_runner_up_says_why_it_lost() -> None:
    found, _ = layouts(CANDIDATES, LADDERS, {}, TWO_CORES, TRAFFIC)
    plan = rank(found, TRAFFIC, {})
    assert plan.chosen.layout.served == ("m:int8", "m:int4")
    assert plan.chosen.prediction.sessions_per_s == max(one.prediction.sessions_per_s for one in plan.ranked)
    assert "fewer sessions per second" in plan.why(plan.ranked[1])


def test_a_target_that_is_missed_decides_before_speed() -> None:
    ladders = {"intent": ("m:int8", "m:bf16"), "core": ("m:int8", "m:bf16")}
    found, _ = layouts(CANDIDATES, ladders, {}, TWO_CORES, TRAFFIC)
    slow = next(one for one in rank(found, TRAFFIC, {}).ranked if one.layout.served == ("m:bf16",))
    limit = 0.9 * slow.prediction.latencies["core"].total_s
    plan = rank(found, TRAFFIC, {"core": Target(total_s=limit)})
    lost = next(one for one in plan.ranked if one.layout.served == ("m:bf16",))
    assert "core would take 1.1 times its target" in plan.why(lost)


def test_layouts_that_are_equally_fast_are_told_apart_by_memory() -> None:
    large, small = candidate("m:bf16", SLOW, 4 * GIB), candidate("m:int8", SLOW, 2 * GIB)
    ladders = {"intent": ("m:int8", "m:bf16"), "core": ("m:int8", "m:bf16")}
    found, _ = layouts({one.id: one for one in (large, small)}, ladders, {}, TWO_CORES, TRAFFIC)
    plan = rank(found, TRAFFIC, {})
    assert plan.chosen.layout.served == ("m:int8",)
    assert "GB more" in plan.why(plan.ranked[1])


METRICS = """
# TYPE tiercel_requests_total counter
tiercel_requests_total{role="intent",requested="m",model="m",variant="int8",outcome="200"} 30
tiercel_requests_total{role="intent",requested="m",model="m",variant="int8",outcome="499"} 5
tiercel_requests_total{role="core",requested="m",model="m",variant="bf16",outcome="200"} 10
# TYPE tiercel_tokens_total counter
tiercel_tokens_total{role="intent",model="m",variant="int8",kind="prompt"} 3000
tiercel_tokens_total{role="intent",model="m",variant="int8",kind="completion"} 240
tiercel_tokens_total{role="core",model="m",variant="bf16",kind="prompt"} 5000
tiercel_tokens_total{role="core",model="m",variant="bf16",kind="completion"} 600
# TYPE tiercel_cached_tokens_total counter
tiercel_cached_tokens_total{role="core",model="m",variant="bf16"} 1000
"""


def test_traffic_is_read_from_the_gateways_own_metrics() -> None:
    traffic = traffic_from_metrics(METRICS, ["intent", "core"], 8)
    assert traffic.roles["intent"] == RoleTraffic(
        requests=0.75, prompt_tokens=100, cached_tokens=0, answer_tokens=8
    )
    assert traffic.roles["core"].new_tokens == 400
    with pytest.raises(TrafficError, match="no request yet"):
        traffic_from_metrics("", ["intent"], 8)


def test_traffic_that_cannot_be_used_is_refused_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "traffic.yaml"
    path.write_text("roles: {intent: {prompt_tokens: 0}}\nsessions: 4\n")
    with pytest.raises(TrafficError, match=r"roles.intent.prompt_tokens: .* got 0"):
        read_traffic(path, ["intent"])
    path.write_text("roles: {nobody: {}}\n")
    with pytest.raises(TrafficError, match=r"roles.nobody: is not a role; known: intent"):
        read_traffic(path, ["intent"])
    with pytest.raises(TrafficError, match="cannot be read"):
        read_traffic(tmp_path / "missing.yaml", ["intent"])
