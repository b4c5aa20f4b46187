"""``tiercel demo``: quantize, gate, serve, send the customers' messages through the team, report.

The demo is of one model, whose variants the report calls by their own names. Every figure is measured in this
run: answers and times at the client, memory and quality from the gateway's ``/metrics``, losses from the
cards.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

import aiohttp
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from deploy.assistant.prompts import CORE, INTENT_CLASSIFIER, SUMMARIZER, SYSTEM_PROMPTS
from deploy.engine import EngineSpec
from deploy.machine import cpu_line
from deploy.measuring import evaluate_variants
from deploy.models import one_model
from deploy.report import format_table, write_report
from deploy.report_data import DemoReport, Machine, RoleReport, VariantReport
from deploy.second_act import Clock, second_act
from deploy.supervisor import Stack
from deploy.team.run import TicketResult, run_team
from deploy.team.tickets import read_tickets
from deploy.team.workflow import MAX_TOKENS, ROLES, user_text
from gateway.config import Config, ModelConfig, load_config, parts_of
from quantize.card import Card
from quantize.evaluate.client import EngineClient
from quantize.evaluate.statistics import percentile
from quantize.gate.judgement import wilson_interval
from quantize.report.tables import format_variants

CONCURRENCY = 6
"""Tickets in work at once; two cores serve three engines here."""

Say = Callable[[str], None]
Metrics = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""(name, labels) of a sample to its value."""


async def run_demo(
    config: Config, config_path: Path, cards: Sequence[Card], out: Path, messages: int, say: Say
) -> None:
    """Run the path from made variants on; write ``report.json``, ``.html`` and ``.png`` into ``out``."""
    began, model = time.monotonic(), one_model(config)
    tickets = read_tickets(Path(str(files("deploy.assistant") / "data" / "messages.jsonl")))[:messages]

    async def gate(engines: dict[str, EngineSpec]) -> None:
        nonlocal cards
        say("3/5 gate: measuring each variant on its own engine")
        cards = await evaluate_variants(model, cards, say, engines)
        say(format_variants(cards))

    forget_watch(config)  # what an earlier run was shown does not count in this one
    say("2/5 serve: starting one engine per served variant")
    async with Stack(config, config_path, say, before_gateway=gate) as stack:
        say(f"4/5 run: {len(tickets)} customer messages through the ADK team")
        sent, clock = time.monotonic(), Clock(is_right)
        with tqdm(total=len(tickets), desc="messages", unit="message", mininterval=1) as bar:

            def advance(result: TicketResult) -> None:
                clock.take(result)
                bar.update()

            results = await run_team(
                tickets,
                stack.url,
                model.name,
                concurrency=CONCURRENCY,
                progress=advance,
            )
        wall = time.monotonic() - sent
        await asyncio.sleep(1.0)  # the last answers are being checked
        metrics = await read_metrics(stack.url)  # before the reference is asked, which would count too
        agreement = await agreement_with_reference(model, stack.url, results)
        say("5/5 watch: a quantized variant is harmed while it serves")
        incident = await second_act(stack, clock, tickets, CONCURRENCY, say)
    forget_watch(config)
    for result in results:
        for line in result.errors:
            say(f"error: {line}")
    report = DemoReport(
        created=datetime.now(UTC),
        machine=Machine(cpu=cpu_line("model name") or "unknown", cores=os.cpu_count() or 1),
        messages=len(results),
        wall_seconds=wall,
        roles={role: role_report(role, results, wall, agreement, metrics) for role in ROLES},
        variants={card.variant: variant_report(card, metrics) for card in cards},
        incident=incident,
    )
    write_report(report, out)
    print(format_table(report))
    say(
        f"report: {out / 'report.html'}, report.png and report.json ({time.monotonic() - began:.0f} s in all)"
    )


def with_what_was_made(config: Config, path: Path, cards: Sequence[Card], say: Say) -> tuple[Config, Path]:
    """The configuration without variants that this machine does not serve, and the file that it is read
    from: a copy in ``run_dir`` where there are any."""
    made, model = {card.variant for card in cards}, one_model(config)
    if not (missing := [variant for variant in model.serve if variant not in made]):
        return config, path
    say(f"going on without {', '.join(missing)}")
    narrowed = config.model_dump(mode="json", exclude_unset=True)
    narrowed["models"][model.name]["serve"] = [variant for variant in model.serve if variant in made]
    config.run_dir.mkdir(parents=True, exist_ok=True)
    copy = config.run_dir / "demo.yaml"
    copy.touch(mode=0o600)
    copy.write_text(yaml.safe_dump(narrowed, sort_keys=False), encoding="utf-8")
    return load_config(copy), copy


def forget_watch(config: Config) -> None:
    """Remove the local store of the watch: a demo's harm is no finding about the variants."""
    for path in config.run_dir.glob("watch.db*"):
        path.unlink()


async def agreement_with_reference(
    model: ModelConfig, url: str, results: Sequence[TicketResult]
) -> dict[str, float | None]:
    """Per role: the share of answers by a quantized variant that the reference gives word by word.

    The reference is asked the same prompts again; None where it served every answer itself.
    """
    shares: dict[str, float | None] = {}
    async with EngineClient(url, model.id(model.reference)) as reference:
        for role in ROLES:
            quantized = [
                (one, result.ticket)
                for result in results
                for one in result.of(role)
                if not one.error and one.variant != model.id(model.reference)
            ]
            prompts = [
                [
                    {"role": "system", "content": SYSTEM_PROMPTS[role]},
                    {"role": "user", "content": user_text(one.agent, ticket)},
                ]
                for one, ticket in quantized
            ]
            answers = await asyncio.gather(*(reference.answer(p, MAX_TOKENS[role]) for p in prompts))
            same = [a.strip() == one.text for a, (one, _) in zip(answers, quantized, strict=True)]
            shares[role] = sum(same) / len(same) if same else None
    return shares


def is_right(agent: str, result: TicketResult) -> bool:
    """The same checks that the gate uses: exact, or every key fact in the summary."""
    text, ticket = result.agents[agent].text, result.ticket
    if agent == SUMMARIZER:
        return all(fact in text for fact in ticket.facts)
    right = {name: aside.answer for name, aside in ticket.specialists.items()}
    return text == {INTENT_CLASSIFIER: ticket.intent, CORE: ticket.answer, **right}[agent]


def role_report(
    role: str,
    results: Sequence[TicketResult],
    wall: float,
    agreement: dict[str, float | None],
    metrics: Metrics,
) -> RoleReport:
    mine = [one for result in results for one in result.of(role)]
    right = sum(is_right(one.agent, result) for result in results for one in result.of(role))
    low, high = wilson_interval(right, len(mine))
    latencies = [r.latency_s for r in mine if r.latency_s is not None and not r.error]
    firsts = [r.ttft_s for r in mine if r.ttft_s is not None]
    labels = {
        label: total(metrics, "tiercel_quality_sentences_total", role=role, label=label)
        for label in ("supported", "unsupported", "not_applicable")
    }
    sentences = sum(labels.values())
    return RoleReport(
        variant_counts=dict(Counter(parts_of(r.variant)[1] for r in mine if r.variant)),
        count=len(mine),
        accuracy=right / len(mine),
        accuracy_low=low,
        accuracy_high=high,
        agreement_with_reference=agreement[role],
        latency_p50_s=percentile(latencies, 0.5) if latencies else None,
        latency_p95_s=percentile(latencies, 0.95) if latencies else None,
        ttft_p50_s=percentile(firsts, 0.5) if firsts else None,
        ttft_p95_s=percentile(firsts, 0.95) if firsts else None,
        tokens_per_second=sum(r.completion_tokens or 0 for r in mine) / wall,
        hallucination_score=(sentences - labels["unsupported"]) / sentences if sentences else None,
    )


def variant_report(card: Card, metrics: Metrics) -> VariantReport:
    evaluation = card.evaluation
    memory = total(metrics, "tiercel_engine_memory_bytes", model=card.model, variant=card.variant)
    return VariantReport(
        scheme=card.scheme,
        weight_bytes=card.weight_bytes,
        kv_bytes_per_token=card.kv_bytes_per_token,
        engine_memory_bytes=round(memory) or None,
        kl_mean=evaluation.text.kl_mean if evaluation and card.variant != card.reference else None,
        perplexity=evaluation.text.perplexity if evaluation else None,
        gate=card.gate,
        accuracy={role: f.accuracy for role, f in evaluation.roles.items()} if evaluation else {},
    )


async def read_metrics(url: str) -> Metrics:
    async with aiohttp.ClientSession() as session, session.get(url + "/metrics") as response:
        text = await response.text()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(metrics: Metrics, name: str, **labels: str) -> float:
    """Sum of a metric's samples that carry these labels."""
    return sum(v for (n, have), v in metrics.items() if n == name and labels.items() <= have)
