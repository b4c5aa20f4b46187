"""What Tiercel adds to every worker of an engine; vLLM takes one class."""

from account_worker import AccountWorker  # type: ignore[import-not-found]
from score_worker import ScoreWorker  # type: ignore[import-not-found]


class WorkerExtension(ScoreWorker, AccountWorker):  # type: ignore[misc]
    """All of it."""
