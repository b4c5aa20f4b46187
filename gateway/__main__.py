"""``python -m gateway --config tiercel.yaml``: run the gateway until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from gateway.app import create_app
from gateway.cards import load_cards
from gateway.config import Config, ConfigError, Gateway, load_config
from gateway.telemetry.logs import log_to_stderr
from quantize.card import Card, CardError

CANNOT_START = 2


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 after a graceful stop, 2 when it cannot start (one sentence on stderr says why)."""
    parser = argparse.ArgumentParser(prog="python -m gateway", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("tiercel.yaml"), help="the configuration file")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config)
        cards = load_cards(config)
        listening = listen(config.gateway)
    except (ConfigError, CardError) as error:
        print(error, file=sys.stderr)
        return CANNOT_START
    with listening:
        serve(config, cards, listening)
    return 0


def listen(gateway: Gateway) -> socket.socket:
    """A listening socket. Raises ConfigError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in gateway.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((gateway.host, gateway.port))
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"gateway.port: {gateway.host}:{gateway.port} cannot be listened on ({error.strerror}); "
            "stop what uses it or set another port"
        ) from None
    return listening


def serve(config: Config, cards: dict[str, Card], listening: socket.socket) -> None:
    """Serve until a signal, then let running requests finish."""
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(config, cards),
            loop="uvloop",
            http="httptools",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=round(config.gateway.shutdown_timeout_s),
        )
    )
    log_to_stderr()
    # uvicorn repeats the signal to these after its shutdown; the default ones would kill the process.
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, server.handle_exit)
    server.run(sockets=[listening])


if __name__ == "__main__":
    sys.exit(main())
