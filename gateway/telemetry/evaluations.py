"""Evaluations as OpenTelemetry's ``gen_ai.evaluation.result`` events.

They go to the process's logger provider. Without one, which is the default, nothing happens; to send them,
install an exporter and start the gateway under ``opentelemetry-instrument``.
"""

from __future__ import annotations

import time
from typing import Any

from opentelemetry._logs import LogRecord, SeverityNumber, get_logger

EVENT = "gen_ai.evaluation.result"


def emit(
    name: str, label: str, score: float | None, *, role: str, of: tuple[str, str], request_id: str
) -> None:
    """One evaluation of one answer. ``label``: what was found; ``score``: 1 is best, None for none;
    ``of``: the answer's model and variant."""
    attributes: dict[str, Any] = {
        "gen_ai.evaluation.name": name,
        "gen_ai.evaluation.score.label": label,
        "gen_ai.agent.name": role,
        "gen_ai.request.model": of[0],
        "tiercel.variant": ":".join(of),
        "tiercel.request_id": request_id,
    }
    if score is not None:
        attributes["gen_ai.evaluation.score.value"] = score
    get_logger("tiercel").emit(
        LogRecord(
            timestamp=time.time_ns(),
            severity_number=SeverityNumber.INFO,
            event_name=EVENT,
            attributes=attributes,
        )
    )
