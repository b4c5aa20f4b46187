"""``tiercel status``: is everything well? Asked of the running gateway, shown on one screen."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from deploy.commands import NOT_WELL, add_json, print_json
from deploy.commands.asking import GatewayClient, NoAnswerError, RefusedError, add_asking, client
from deploy.commands.readings import (
    KV_CACHE,
    MEMORY,
    QUEUE,
    RESIDENT,
    STARTED,
    Flow,
    Percentiles,
    Reading,
    bytes_text,
    comparable,
    flows,
    parse,
    percentiles_text,
    share_text,
    span_text,
)
from gateway.config import ConfigError, parts_of, slug, variant_id
from quantize.report.tables import align

TIMEOUT_S = 10.0
LONGEST_S = 86_400.0
FULL_CACHE, LONG_QUEUE = 0.95, 32
"""Share of a KV cache, and requests that wait in the engines of a variant, at which the alerts complain."""


def add_status(commands: Any) -> None:
    text = "is everything well? pools, roles, the watch, rates: one screen"
    command = add_asking(commands, "status", status, text)
    command.add_argument("--over", type=float, default=2.0, help="seconds that rates are taken over")
    add_json(command)


def status(options: argparse.Namespace) -> None:
    """Exit status 1 when something is not well."""
    if not 0 < options.over <= LONGEST_S:
        raise ConfigError(
            f"--over: {options.over:g} is no time to take rates over; give seconds, a day at most"
        )
    found = look(client(options, TIMEOUT_S), options.over)
    if options.json:
        print_json(found)
    else:
        print(format_status(found))
    if not found["well"]:
        sys.exit(NOT_WELL)


def look(gateway: GatewayClient, over_s: float) -> dict[str, Any]:
    """All that is known now, with what is not well. Raises NoAnswerError or RefusedError."""
    before = _read(gateway)
    config = gateway.ask("/admin/config")
    watch = _watch(gateway, config)
    roles = [_role(gateway, role) for role in config["roles"]]
    time.sleep(max(0.0, before.at + over_s - time.monotonic()))
    now = _read(gateway)
    readiness = gateway.ask("/readiness", also=503)
    rates = flows(before, now) if comparable(before, now) else None
    found = {
        "time": time.time(),
        "url": gateway.url,
        "well": True,
        "not_well": [],
        "over_s": now.at - before.at,
        "gateway": _gateway(config, now),
        "pools": [_pool(variant, pool, now) for variant, pool in readiness["pools"].items()],
        "roles": [{**role, **_rates(role["role"], rates)} for role in roles],
        "watch": watch,
    }
    found["not_well"] = [{"what": what, "fix": fix} for what, fix in not_well(found, config)]
    found["well"] = not found["not_well"]
    return found


def _read(gateway: GatewayClient) -> Reading:
    text = gateway.text("/metrics")
    try:
        return parse(text, time.monotonic())
    except ValueError:
        raise NoAnswerError(f"{gateway.url}/metrics is no gateway's; give --url") from None


def _watch(gateway: GatewayClient, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the watch says of variants in roles. Its store may be down while the gateway serves."""
    from gateway.quality.rates import ENGINE

    if not config["watch"]["enabled"]:
        return {"enabled": False, "error": None, "cells": []}
    try:
        report = gateway.ask("/admin/watch?since_s=1&events=0")
    except RefusedError as error:
        if error.status != 503:
            raise
        return {"enabled": True, "error": error.message, "cells": []}
    told = ("variant", "role", "status", "serves", "pinned", "why", "since", "verdict")
    cells = [{name: cell[name] for name in told} for cell in report["cells"] if cell["role"] != ENGINE]
    return {"enabled": True, "error": None, "cells": cells}


def _role(gateway: GatewayClient, role: str) -> dict[str, Any]:
    """Who serves a role at this moment, and why."""
    route = gateway.ask("/v1/route", {"model": role})
    if route["role"] != role:
        raise RefusedError(
            f"the key's requests are all of role {route['role']}, so nothing can be said of {role}; "
            "give an admin's key without `role`",
            403,
        )
    reason = route["reason"]
    if route["variant"] is not None and route["variant"] != route["ladder"][0]:
        reason = "raised_pool_down"
    chosen = next((step for step in route["considered"] if step["variant"] == route["variant"]), None)
    passed_over = [
        {"variant": step["variant"], "verdict": step["verdict"], "why": step["why"]}
        for step in route["considered"]
        if chosen is not None and step["memory_bytes"] < chosen["memory_bytes"]
    ]
    return {
        "role": role,
        "variant": route["variant"],
        "first_choice": route["ladder"][0],
        "reason": reason if route["variant"] is not None else "pool_down",
        "passed_over": passed_over,
    }


def _gateway(config: Mapping[str, Any], now: Reading) -> dict[str, Any]:
    started = now.one(STARTED)
    return {
        "models": list(config["models"]),
        "references": {name: variant_id(name, one["reference"]) for name, one in config["models"].items()},
        "workers": config["gateway"]["workers"],
        "up_s": None if started is None else max(0.0, time.time() - started),
        "memory_bytes": now.one(RESIDENT),
    }


def _pool(variant: str, pool: Mapping[str, Any], now: Reading) -> dict[str, Any]:
    replicas = [
        {
            "name": name,
            **replica,
            "queue": now.of_replica(QUEUE, variant, name),
            "kv_cache_usage": now.of_replica(KV_CACHE, variant, name),
            "memory_bytes": now.of_replica(MEMORY, variant, name),
        }
        for name, replica in pool["replicas"].items()
    ]
    return {"variant": variant, "reachable": pool["reachable"], "replicas": replicas}


def _rates(role: str, rates: list[Flow] | None) -> dict[str, Any]:
    """Of all variants together; the percentiles are of the variant that served most."""
    if rates is None:
        return {"requests_per_s": None, "errors_per_s": None, "p50_s": None, "p95_s": None}
    mine = [flow for flow in rates if flow.role == role]
    most = max(mine, key=lambda flow: flow.requests, default=None)
    took = most.duration if most else None
    return {
        "requests_per_s": sum(flow.requests for flow in mine),
        "errors_per_s": sum(flow.errors for flow in mine),
        "p50_s": took.p50 if took else None,
        "p95_s": took.p95 if took and took.p95 != float("inf") else None,
    }


def not_well(found: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Everything that a person should see to, each with what to do."""
    for pool in found["pools"]:
        variant, waiting = pool["variant"], sum(one["queue"] or 0 for one in pool["replicas"])
        if not pool["replicas"]:
            yield f"the pool of {variant} has no replica", f"add one to pools.{variant}"
        for replica in pool["replicas"]:
            name, url = replica["name"], replica["url"]
            if not replica["reachable"]:
                given = config["pools"].get(variant)
                model, short = parts_of(variant)
                log = f"{config['run_dir']}/logs/engine-{slug(model)}-{short}.log"
                fix = (
                    f"start it, or take it out of pools.{variant}" if given else f"its last words: tail {log}"
                )
                yield f"{name} at {url} cannot be reached", fix
            elif not replica["usable"]:
                yield (
                    f"{name} at {url} failed and is left alone for a while",
                    "the gateway's log has its errors",
                )
            if (usage := replica["kv_cache_usage"]) is not None and usage > FULL_CACHE:
                yield f"the KV cache of {name} is {100 * usage:.0f} % full", "add a replica"
        if waiting > LONG_QUEUE:
            yield f"{waiting:.0f} requests wait in the engines of {variant}", "add a replica"
    for role in found["roles"]:
        if role["variant"] is None:
            yield f"nothing can serve {role['role']}", "bring one of its pools back"
        if role["errors_per_s"]:
            share = role["errors_per_s"] / role["requests_per_s"]
            yield f"{100 * share:.1f} % of {role['role']}'s requests fail", "the gateway's log has the errors"
    watch = found["watch"]
    if watch["error"]:
        yield f"the watch's store cannot be used: {watch['error']}", "bring it back; requests go on meanwhile"
    for cell in watch["cells"]:
        who = f"{cell['variant']} as {cell['role']}"
        if not cell["serves"] and cell["pinned"] is None:
            yield f"{who} is out of service ({cell['status']}): {cell['why']}", _restore(cell)
        elif cell["serves"] and cell["verdict"] == "not enough evidence":
            yield (
                f"{who}: a check alarms, and no second one agrees",
                "tiercel watch says which; read the answers",
            )


def _restore(cell: Mapping[str, Any]) -> str:
    return f"tiercel watch says more; tiercel watch restore {cell['variant']} {cell['role']} puts it back"


def format_status(found: Mapping[str, Any]) -> str:
    """For a terminal."""
    gateway, concerns = found["gateway"], found["not_well"]
    many = f"{len(concerns)} thing{'s are' if len(concerns) > 1 else ' is'} not well"
    about = [f"{found['url']} serves {', '.join(gateway['models'])}"]
    if gateway["up_s"] is not None:
        about.append(f"up {span_text(gateway['up_s'])}")
    if gateway["memory_bytes"] is not None:
        about.append(bytes_text(gateway["memory_bytes"]))
    if gateway["workers"] > 1:
        about[-1] += f" (one of {gateway['workers']} workers)"
    parts = [("all is well" if found["well"] else many) + ": " + ", ".join(about), ""]
    parts += [align(_replica_rows(found)), "", align(_role_rows(found))]
    if found["roles"] and found["roles"][0]["requests_per_s"] is None:
        parts.append("no rates: the gateway was started meanwhile, or one of its workers did not answer")
    if not found["watch"]["enabled"]:
        parts += ["", "the watch is off (watch.enabled)"]
    parts += [line for cell in found["watch"]["cells"] if (line := _pinned(cell))]
    for concern in concerns:
        parts += ["", f"not well: {concern['what']}", f"      do: {concern['fix']}"]
    return "\n".join(parts)


def _pinned(cell: Mapping[str, Any]) -> str:
    if cell["pinned"] is None:
        return ""
    how = "kept in" if cell["serves"] else "kept out of"
    return f"pinned: {cell['variant']} is {how} {cell['role']}'s choice: {cell['why']}"


def _replica_rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["replica", "state", "in flight", "queue", "KV cache", "memory", "address"]]
    for pool in found["pools"]:
        for one in pool["replicas"]:
            rows.append(
                [
                    one["name"],
                    state_text(one),
                    str(one["in_flight"]),
                    "-" if one["queue"] is None else f"{one['queue']:.0f}",
                    share_text(one["kv_cache_usage"]),
                    bytes_text(one["memory_bytes"]),
                    one["url"],
                ]
            )
    return rows


def state_text(replica: Mapping[str, Any]) -> str:
    if not replica["reachable"]:
        return "DOWN"
    return "ok" if replica["usable"] else "FAILING"


def _role_rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["role", "served by", "requests/s", "errors", "p50/p95", "why"]]
    for role in found["roles"]:
        asked, errors = role["requests_per_s"], role["errors_per_s"]
        took = None if role["p50_s"] is None else Percentiles(role["p50_s"], role["p95_s"] or float("inf"))
        without = [
            f"not {one['variant']} ({one['verdict'].replace('_', ' ')})" for one in role["passed_over"]
        ]
        rows.append(
            [
                role["role"],
                role["variant"] or "NOTHING",
                "-" if asked is None else f"{asked:.1f}",
                share_text(errors / asked if asked else None),
                percentiles_text(took),
                "; ".join([role["reason"].replace("_", " "), *without]),
            ]
        )
    return rows
