"""``python -m gateway --config tiercel.yaml``: run the gateway until SIGTERM or SIGINT."""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until somebody listens for it: what follows takes a second

import argparse
import os
import socket
import sys
from pathlib import Path

from gateway.app import Gateway
from gateway.cards import load_cards
from gateway.config import Config, ConfigError, load_config, parse_config
from gateway.server import Server, listen
from gateway.telemetry.logs import AccessLog, logging_to_stderr
from gateway.workers.channel import ToParent
from gateway.workers.parent import CANNOT_START, receive_first, run_workers
from quantize.card import Card, CardError


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 after a graceful stop, 2 when it cannot start (one sentence on stderr says why)."""
    parser = argparse.ArgumentParser(prog="python -m gateway", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("tiercel.yaml"), help="the configuration file")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--channel", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    fill_standard_descriptors()
    try:
        if options.worker is not None:
            work(options.config, options.worker, socket.socket(fileno=options.channel))
        else:
            return start(options.config)
    except (ConfigError, CardError) as error:
        print(error, file=sys.stderr)
        return CANNOT_START
    return 0


def fill_standard_descriptors() -> None:
    """Whoever has closed standard error wants no log: but the next file that is opened, be it a database or a
    client's connection, would get its number, and then the log."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)


def start(path: Path) -> int:
    """The gateway, or the parent of its workers; the exit status. Raises ConfigError or CardError."""
    config = load_config(path)
    cards = load_cards(config)
    with listen(config.gateway) as listening:
        if config.gateway.workers == 1:
            serve(config, cards, path, listening)
            return 0
    # The address can be had; the workers take it.
    text = path.read_text(encoding="utf-8")

    def check(text: str, source: str) -> Config:
        config = parse_config(text, source, path.resolve().parent)
        load_cards(config)
        return config

    with logging_to_stderr():
        return run_workers(config, text, path, check)


def work(path: Path, worker: int, connection: socket.socket) -> None:
    """A worker, with the configuration that its parent gives it. Raises ConfigError or CardError."""
    text, generation = receive_first(connection)
    config = parse_config(text, str(path), path.resolve().parent)
    cards = load_cards(config)
    with listen(config.gateway) as listening:
        serve(config, cards, path, listening, worker, ToParent(connection, generation))


def serve(
    config: Config,
    cards: dict[str, Card],
    path: Path,
    listening: socket.socket,
    worker: int | None = None,
    parent: ToParent | None = None,
) -> None:
    """Serve until a signal. Raises ConfigError for what shows only when the parts are put together."""

    def load() -> tuple[Config, dict[str, Card]]:
        fresh = load_config(path)
        return fresh, load_cards(fresh)

    with logging_to_stderr() as writer:
        gateway = Gateway(config, cards, load=load, worker=worker, parent=parent, log=AccessLog(writer))
        Server(gateway, parent).serve_until_stopped(listening)


if __name__ == "__main__":
    sys.exit(main())
