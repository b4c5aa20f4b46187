"""What the gateway's metrics say in the end is what the engines did, to the token."""

from __future__ import annotations

import time

import aiohttp
import pytest
from gateway_stack import eventually, running_gateway
from prometheus_client import generate_latest

from benchmarks.gateway.trial import (
    FATES,
    Trial,
    configuration,
    differences,
    read_books,
    read_outcomes,
    without_outcome,
)


@pytest.mark.parametrize(("sample_rate", "requests"), [(0.0, 1500), (1.0, 1500)])
async def test_the_books_balance(sample_rate: float, requests: int) -> None:
    """Aborts, hedges, escalations and faults of every kind, in every protocol; ``benchmarks.gateway.books``
    does it with many more, and with workers that are restarted."""
    trial = Trial(seed=int(sample_rate))
    with trial.engines(4) as (engines, urls):
        replicas = dict(
            zip(
                ("assistant:bf16-0", "assistant:bf16-1", "assistant:int8-0", "assistant:int4-kv8-0"),
                engines,
                strict=True,
            )
        )
        pools = {"bf16": tuple(urls[:2]), "int8": (urls[2],), "int4-kv8": (urls[3],)}
        quality = {"sample_rate": sample_rate}
        async with running_gateway(pools=pools, quality=quality, **configuration()) as stack:
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(connector=connector) as http:
                until = time.monotonic() + 600  # however busy the machine is
                assert await trial.run(stack.url, http, range(requests), 32, until) == requests
            plane = stack.gateway.plane
            await eventually(lambda: not plane.active and stack.gateway.settlement.idle, within_s=120)
            text = generate_latest(stack.registry).decode()
            assert differences(read_books(text), trial.expected(replicas)) == {}
            assert without_outcome(read_books(text), read_outcomes(text)) == {}
    fates = {trial.plan(number).fate for e in engines for work in e.account if (number := trial.number(work))}
    assert fates == FATES.keys(), "each of them has happened"
