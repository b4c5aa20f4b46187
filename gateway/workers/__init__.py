"""Several processes that share the gateway's port (``SO_REUSEPORT``), and what they have to agree on.

Each worker is a whole gateway. What they share lies in memory that the parent outlives: a board of requests
in flight, so that limits and the choice of a replica count all of them (``board.py``), and every worker's
counters, so that whoever is asked for metrics adds up all of them, those of a worker included that has died
or does not answer (``sheet.py``). The parent starts them, keeps the configuration that was last accepted,
and hands them a new one (``parent.py``, ``channel.py``). Each worker keeps its own view of which replicas
fail, and of what is in their caches.
"""
