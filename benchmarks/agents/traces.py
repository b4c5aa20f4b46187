"""Real agent traces cut to this machine's size, in the format in which AIPerf replays them.

A trace is a session of a coding agent: its requests in order, and entries of type ``subagent`` with requests
of their own, which run while the session waits. Of each a window is taken that holds its first sub-agents,
and everything in it is made shorter. Prefixes that requests have in common stay in common: a block's id
stands for the whole prefix up to its end, so keeping one id of every so many is a trace whose blocks are as
many times longer, and dividing lengths by the scale makes them blocks of ``BLOCK`` tokens.

Who asks stands in the field ``model``, where it is the name of the request's role: a gateway takes a role as
a model, an engine can be told to answer to both names, and a static rule goes by nothing else.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.fleet.traffic import RoleTraffic, Traffic

CORE, AUXILIARY = "core", "auxiliary"
ROLES = {None: CORE, "Explore": AUXILIARY, "Plan": AUXILIARY, "general-purpose": AUXILIARY}
"""The role of a session's own requests, and of a sub-agent's by its type."""
BLOCK = 64
"""Tokens of a block of what is made: AIPerf 0.13 takes so many, whatever a trace says of its own."""


@dataclass(frozen=True)
class Scale:
    """What is taken of a trace and how much shorter it is made."""

    prompt: int = 64
    """Prompts become so many times shorter. A multiple of what makes whole blocks of :data:`BLOCK` tokens."""
    answer: int = 16
    """Answers become so many times shorter."""
    longest_prompt: int = 2048
    longest_answer: int = 64
    turns: int = 4
    """Requests of the session itself, at most."""
    agents: int = 2
    """Sub-agents, at most."""
    agent_turns: int = 6
    """Requests of each sub-agent, at most."""
    pace: float = 32.0
    """Times between requests become so many times shorter."""
    longest_thought_s: float = 0.5
    """Between an answer and the next request, after that; what is beyond it is cut."""

    def kept(self, block_size: int) -> int:
        """One id of so many is kept. Raises ValueError where no whole number of blocks makes one."""
        merged = BLOCK * self.prompt
        if merged % block_size or merged < block_size:
            raise ValueError(
                f"prompts {self.prompt} times shorter make {BLOCK} tokens of {merged}, which is no multiple "
                f"of the trace's blocks of {block_size}; take a multiple of {max(1, block_size // BLOCK)}"
            )
        return merged // block_size


def read_traces(folder: Path) -> list[dict[str, Any]]:
    """All traces in a folder, by name. Raises FileNotFoundError where there is none."""
    paths = sorted(folder.glob("*.json.gz"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no agent traces (*.json.gz); say with --traces where they are")
    return [json.loads(gzip.decompress(path.read_bytes())) for path in paths]


def sessions(traces: Sequence[Mapping[str, Any]], count: int, scale: Scale) -> list[dict[str, Any]]:
    """``count`` sessions, the traces in turn. One taken again has another name, and so other words."""
    made = []
    for number in range(count):
        trace, copy = traces[number % len(traces)], number // len(traces)
        one = scaled(trace, scale)
        made.append({**one, "id": f"{one['id']}_{copy}" if copy else one["id"]})
    return made


def scaled(trace: Mapping[str, Any], scale: Scale) -> dict[str, Any]:
    """A session of a trace, as AIPerf reads one."""
    kept = scale.kept(trace["block_size"])
    made: list[dict[str, Any]] = []
    for entry in window(trace["requests"], scale.turns, scale.agents):
        if entry["type"] != "subagent":
            made.append(_request(entry, CORE, kept, scale))
            continue
        role = role_of(entry["subagent_type"])
        inner = [one for one in entry["requests"] if one.get("hash_ids")][: scale.agent_turns]
        requests = [_request(one, role, kept, scale) for one in inner]
        if requests and made:  # one that nothing comes before has nobody who asks for it
            made.append(_agent(entry, role, requests, scale))
    began = made[0]["t"] if made else 0.0
    for one in made:
        one["t"] = round(one["t"] - began, 3)
    return {
        "id": trace["id"],
        "models": [CORE, AUXILIARY],
        "block_size": BLOCK,
        "hash_id_scope": "local",
        **_beginning(trace, made[:1], scale),
        "requests": made,
    }


def role_of(kind: str | None) -> str:
    """Raises ValueError for a kind of sub-agent that has no role."""
    try:
        return ROLES[kind]
    except KeyError:
        known = ", ".join(name for name in ROLES if name)
        raise ValueError(f"sub-agents of type {kind!r} have no role; known: {known}") from None


def window(entries: Sequence[Mapping[str, Any]], turns: int, agents: int) -> list[Mapping[str, Any]]:
    """At most ``turns`` requests and ``agents`` sub-agents in a row, from the request before the first
    sub-agent on. A trace without sub-agents is taken from its beginning."""
    entries = [one for one in entries if one["type"] == "subagent" or one.get("hash_ids")]
    first = next((n for n, one in enumerate(entries) if one["type"] == "subagent"), 1)
    taken: list[Mapping[str, Any]] = []
    for entry in entries[max(0, first - 1) :]:
        is_agent = entry["type"] == "subagent"
        if sum((one["type"] == "subagent") is is_agent for one in taken) < (agents if is_agent else turns):
            taken.append(entry)
        elif not is_agent:
            break
    return taken


def _request(entry: Mapping[str, Any], role: str, kept: int, scale: Scale) -> dict[str, Any]:
    length = max(1, min(entry["in"] // scale.prompt, scale.longest_prompt))
    return {
        "t": round(entry["t"] / scale.pace, 3),
        "type": "n",
        "model": role,
        "in": length,
        "out": max(1, min(entry["out"] // scale.answer, scale.longest_answer)),
        "hash_ids": list(entry["hash_ids"][kept - 1 :: kept])[: length // BLOCK],
        "stop": entry.get("stop") or "",
        "api_time": (entry.get("api_time") or 0.0) / scale.pace,
        "think_time": min((entry.get("think_time") or 0.0) / scale.pace, scale.longest_thought_s),
    }


def _agent(
    entry: Mapping[str, Any], role: str, requests: list[dict[str, Any]], scale: Scale
) -> dict[str, Any]:
    return {
        "t": round(entry["t"] / scale.pace, 3),
        "type": "subagent",
        "agent_id": entry["agent_id"],
        "subagent_type": entry["subagent_type"],
        "status": entry["status"],
        "requests": requests,
        "models": [role],
        **_beginning(entry, requests[:1], scale),
    }


def _beginning(
    declared: Mapping[str, Any], first: Sequence[Mapping[str, Any]], scale: Scale
) -> dict[str, int]:
    """What of the first prompt is system prompt and tools: whole blocks, and never all of it."""
    tokens = (declared["tool_tokens"] + declared["system_tokens"]) // scale.prompt
    room = min(((one["in"] - 1) // BLOCK for one in first), default=0)
    return {"tool_tokens": 0, "system_tokens": BLOCK * min(tokens // BLOCK, room)}


def write(made: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """A file per session, and no others."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    for one in made:
        (folder / f"{one['id']}.json").write_text(json.dumps(one), encoding="utf-8")


def streams(session: Mapping[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Role and requests of the session itself, and of each of its sub-agents."""
    yield CORE, [one for one in session["requests"] if one["type"] != "subagent"]
    for one in session["requests"]:
        if one["type"] == "subagent":
            yield one["models"][0], one["requests"]


def shared_tokens(session: Mapping[str, Any]) -> dict[str, int]:
    """By role, prompt tokens of a session that a cache without end has already: whole blocks that a request
    before has, in the order in which requests were sent."""
    found = dict.fromkeys((role for role, _ in streams(session)), 0)
    order = [
        (one["t"] + (entry["t"] if one is not entry else 0.0), one)  # a sub-agent's begin with it
        for entry in session["requests"]
        for one in entry.get("requests", [entry])
    ]
    seen: set[int] = set()
    for _, one in sorted(order, key=lambda pair: pair[0]):
        cached = 0
        for block in one["hash_ids"]:
            if block not in seen:
                break
            cached += BLOCK
        found[one["model"]] += cached
        seen.update(one["hash_ids"])
    return found


def traffic(made: Sequence[Mapping[str, Any]], at_once: int) -> Traffic:
    """The same for a fleet's plan: means over all sessions."""
    asked: dict[str, list[dict[str, Any]]] = {}
    cached: dict[str, int] = {}
    for session in made:
        for role, requests in streams(session):
            asked.setdefault(role, []).extend(requests)
        for role, tokens in shared_tokens(session).items():
            cached[role] = cached.get(role, 0) + tokens
    roles = {
        role: RoleTraffic(
            requests=round(len(requests) / len(made), 2),
            prompt_tokens=round(sum(one["in"] for one in requests) / len(requests)),
            cached_tokens=round(cached[role] / len(requests)),
            answer_tokens=round(sum(one["out"] for one in requests) / len(requests)),
        )
        for role, requests in asked.items()
    }
    return Traffic(roles=roles, sessions=at_once)
