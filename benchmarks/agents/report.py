"""The agents benchmark's results: tables for its document, and a picture."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.agents.picture import draw
from benchmarks.agents.traces import AUXILIARY, CORE

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
BASE, OURS = "bf16", ("tiercel-pools", "tiercel")
"""The arrangement that all others are compared with, and those that are compared with all others."""
Document = Mapping[str, Any]
Result = Mapping[str, Any]


def write_report(document: Document, docs: Path | None, picture: Path | None) -> None:
    """Print the tables; draw the picture; put both between the marks of ``docs``."""
    text = tables(document)
    print(text)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(document, picture)
    if docs is not None:
        if picture is not None:
            shown = os.path.relpath(picture, docs.parent)
            text = f"![Sessions per second, and each role's times]({shown})\n\n{text}"
        docs.write_text(put_in(docs.read_text(encoding="utf-8"), text), encoding="utf-8")


def put_in(page: str, text: str) -> str:
    """Raises ValueError where the marks are missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document needs the lines {BEGIN} and {END}, between which results are written")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def by_arrangement(document: Document) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {name: [] for name in document["titles"]}
    for result in document["results"]:
        found[result["arrangement"]].append(result)
    return found


def tables(document: Document) -> str:
    roles = document["traffic"]["roles"]
    asked = "; ".join(
        f"`{role}` {one['requests']:g} requests of {one['prompt_tokens']:.0f} tokens, "
        f"{one['cached_tokens']:.0f} of them in common with one before, "
        f"and {one['answer_tokens']:.0f} of answer"
        for role, one in roles.items()
    )
    repeats = 1 + max(result["repeat"] for result in document["results"])
    parts = (
        f"{document['sessions']} sessions, {document['at_once']} at a time, "
        f"{document['requests']} requests. "
        f"A session: {asked}. Medians of {repeats} repeats (least–most).",
        _speed(document),
        _times(document),
        _cost(document),
        _against(document),
        _quality(document),
        _plan(document),
        *dict.fromkeys(result["doubt"] for result in document["results"]),
    )
    return "\n\n".join(part for part in parts if part)


def _speed(document: Document) -> str:
    rows = [["arrangement", "sessions/s", "all sessions, s", "a session, s", "core p50, s", "core p95, s",
             "auxiliary p50, s", "auxiliary p95, s"]]  # fmt: skip
    for name, results in by_arrangement(document).items():
        rows.append(
            [
                document["titles"][name],
                spread([one["sessions_per_s"] for one in results], 3),
                spread([one["makespan_s"] for one in results], 1),
                spread([one["session_s"]["p50"] for one in results], 1),
                *(
                    spread([one["roles"][role]["total_s"][share] for one in results], 2)
                    for role in (CORE, AUXILIARY)
                    for share in ("p50", "p95")
                ),
            ]
        )
    return table(rows)


def _times(document: Document) -> str:
    rows = [["time to first token", "core p50, s", "core p95, s", "auxiliary p50, s", "auxiliary p95, s",
             "found in caches", "of core's prompts", "of auxiliary's"]]  # fmt: skip
    for name, results in by_arrangement(document).items():
        cells = [
            spread([one["roles"][role]["ttft_s"][share] for one in results], 2)
            for role in (CORE, AUXILIARY)
            for share in ("p50", "p95")
        ]
        cached = [
            f"{100 * statistics.median(map(_cached(role), results)):.0f} %" for role in (CORE, AUXILIARY)
        ]
        hits = f"{100 * statistics.median(one['cache_hit_rate'] for one in results):.0f} %"
        rows.append([document["titles"][name], *cells, hits, *cached])
    return table(rows)


def _cached(role: str) -> Callable[[Result], float]:
    def share(one: Result) -> float:
        found = one["roles"][role]
        return float(found["cached_tokens"] / found["prompt_tokens"])

    return share


def _cost(document: Document) -> str:
    rows = [["arrangement", "core answered by", "auxiliary answered by", "engines, GB", "engines, CPU s",
             "before them, CPU s"]]  # fmt: skip
    for name, results in by_arrangement(document).items():
        memory = [sum(one["memory_bytes"].values()) / 1e9 for one in results]
        cores = [[one["cpu_s"][part] for one in results] for part in ("engines", "door")]
        rows.append(
            [
                document["titles"][name],
                *(_answered_by(results, role) for role in (CORE, AUXILIARY)),
                spread(memory, 1),
                *(spread(one, 1) for one in cores),
            ]
        )
    return table(rows)


def _answered_by(results: Sequence[Result], role: str) -> str:
    counts: dict[str, int] = {}
    for one in results:
        for variant, count in one["served"].get(role, {}).items():
            counts[variant] = counts.get(variant, 0) + count
    total = sum(counts.values()) or 1
    if len(counts) == 1:
        return f"`{next(iter(counts))}`"
    return ", ".join(f"`{name}` {100 * count / total:.0f} %" for name, count in counts.items())


def against(document: Document, base: str) -> dict[str, dict[str, list[float]]]:
    """By arrangement, ratios to ``base`` in the same repeat."""
    found = by_arrangement(document)
    other = {one["repeat"]: one for one in found.get(base, [])}
    ratios: dict[str, dict[str, list[float]]] = {}
    for name, results in found.items():
        pairs = [(one, other[one["repeat"]]) for one in results if one["repeat"] in other]
        if name != base and pairs:
            ratios[name] = {
                title: [figure(one) / figure(two) for one, two in pairs] for title, figure in COMPARED.items()
            }
    return ratios


def _figure(role: str, kind: str, share: str) -> Callable[[Result], float]:
    return lambda one: float(one["roles"][role][kind][share])


COMPARED: Mapping[str, Callable[[Result], float]] = {
    "sessions/s": lambda one: float(one["sessions_per_s"]),
    "core p50": _figure(CORE, "total_s", "p50"),
    "core p95": _figure(CORE, "total_s", "p95"),
    "core first token p95": _figure(CORE, "ttft_s", "p95"),
    "auxiliary p50": _figure(AUXILIARY, "total_s", "p50"),
    "auxiliary p95": _figure(AUXILIARY, "total_s", "p95"),
    "auxiliary first token p95": _figure(AUXILIARY, "ttft_s", "p95"),
}


def _against(document: Document) -> str:
    rows = [["in the same repeat", *COMPARED]]
    titles = document["titles"]
    for name, ratios in against(document, BASE).items():
        cells = [spread(values, 2) for values in ratios.values()]
        rows.append([f"{titles[name]} ÷ {titles[BASE]}", *cells])
    for at, ours in enumerate(OURS):
        for base in titles:
            if base not in (BASE, *OURS[at:]) and ours in (found := against(document, base)):
                cells = [spread(values, 2) for values in found[ours].values()]
                rows.append([f"{titles[ours]} ÷ {titles[base]}", *cells])
    return table(rows) if len(rows) > 1 else ""


def _quality(document: Document) -> str:
    rows = [["by the cards", "role", "KL, nats", "the reference's first choice", "gate"]]
    for variant, roles in document["quality"].items():
        for role, one in roles.items():
            kl = "" if one["kl"] is None else f"{one['kl']:.3f}"
            agreed = one["first_choice_agreement"]
            rows.append(
                [f"`{variant}`", role, kl, "" if agreed is None else f"{100 * agreed:.1f} %", one["outcome"]]
            )
    return table(rows)


def _plan(document: Document) -> str:
    rows = [["`fleet plan` predicted", "sessions/s", "core, s", "auxiliary, s"]]
    for one in document["plan"]:
        latency = one["latency_s"]
        rows.append(
            [
                " + ".join(one["served"]),
                f"{one['sessions_per_s']:.3f}",
                *(f"{latency[role]:.2f}" for role in (CORE, AUXILIARY)),
            ]
        )
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the head."""
    head, *rest = rows
    lines = [head, ["---"] * len(head), *rest]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int) -> str:
    """The median, with the least and the most where there are several."""
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"
