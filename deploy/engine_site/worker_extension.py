"""What Tiercel adds to every worker of an engine; vLLM takes one class."""

from score_worker import ScoreWorker  # type: ignore[import-not-found]


class WorkerExtension(ScoreWorker):  # type: ignore[misc]
    """All of it."""
