"""vLLM's OpenAI-compatible server with what Tiercel measures and drains by: routes and a worker extension.

For GPUs it is the entry as it stands, in place of ``python -m vllm.entrypoints.openai.api_server``; the CPU's
(:mod:`serve_vllm`) calls :func:`add_scoring`. The folder has to be on PYTHONPATH, for the workers. A
``--worker-extension-cls`` of one's own is kept, and the route then answers 501.
"""

import sys

import vllm.plugins
from account_route import AccountRoute  # type: ignore[import-not-found]
from drain_route import DrainRoute  # type: ignore[import-not-found]
from score_route import ScoreRoute  # type: ignore[import-not-found]

EXTENSION = "worker_extension.WorkerExtension"
ROUTES = (ScoreRoute, AccountRoute, DrainRoute)


def add_scoring(arguments: list[str]) -> None:
    """Add the routes to the server that is about to start, and the extension to its ``arguments``."""
    load_endpoint_plugins = vllm.plugins.load_endpoint_plugins

    def load(supported_tasks: object = None) -> list[object]:
        return [*load_endpoint_plugins(supported_tasks), *(route() for route in ROUTES)]

    # An entry point would need VLLM_PLUGINS, which also switches off every plugin that it does not name.
    vllm.plugins.load_endpoint_plugins = load
    if not any(argument.partition("=")[0] == "--worker-extension-cls" for argument in arguments):
        arguments += ["--worker-extension-cls", EXTENSION]


if __name__ == "__main__":
    from vllm.entrypoints.launchers.api_server.entry import main

    add_scoring(sys.argv)
    main()
