"""The system prompts of the demo team's roles: one sentence each, shared by training and serving.

The shipped demo model tells its jobs apart by exactly these sentences.
"""

from __future__ import annotations

INTENT_CLASSIFIER = "intent_classifier"
SPECIALIST = "specialist"
SUMMARIZER = "summarizer"
CORE = "core"

SYSTEM_PROMPTS: dict[str, str] = {
    INTENT_CLASSIFIER: "Classify the intent of the message.",
    SPECIALIST: "Answer the question from the record.",
    SUMMARIZER: "Summarize the record in one sentence.",
    CORE: "Answer the question from the record.",
}
"""Role name to system prompt. A specialist does what core does, for other agents instead of a person."""


def with_record(record: str, question: str) -> str:
    """The user message that carries a record together with a question about it."""
    return f"{record}\n\n{question}"
