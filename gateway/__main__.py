"""``python -m gateway --config tiercel.yaml``: run the gateway until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from gateway.app import Gateway
from gateway.cards import load_cards
from gateway.config import Config, ConfigError, GatewaySettings, load_config
from gateway.telemetry.logs import EVENTS, log_to_stderr
from gateway.workers import run_workers
from quantize.card import Card, CardError

CANNOT_START = 2


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 after a graceful stop, 2 when it cannot start (one sentence on stderr says why)."""
    parser = argparse.ArgumentParser(prog="python -m gateway", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("tiercel.yaml"), help="the configuration file")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config)
        cards = load_cards(config)
        listening = listen(config.gateway)
    except (ConfigError, CardError) as error:
        print(error, file=sys.stderr)
        return CANNOT_START
    with listening:
        if config.gateway.workers > 1 and options.worker is None:
            listening.close()  # it could be listened on
            return run_workers(config, options.config)
        try:
            gateway = make_gateway(config, cards, options.config, options.worker)
        except ConfigError as error:
            print(error, file=sys.stderr)
            return CANNOT_START
        serve(gateway, config, listening)
    return 0


def listen(gateway: GatewaySettings) -> socket.socket:
    """A listening socket. Raises ConfigError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in gateway.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if gateway.workers > 1:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
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


def make_gateway(config: Config, cards: dict[str, Card], path: Path, worker: int | None = None) -> Gateway:
    """Raises ConfigError for what shows only when the parts are put together."""

    def load() -> tuple[Config, dict[str, Card]]:
        fresh = load_config(path)
        return fresh, load_cards(fresh)

    return Gateway(config, cards, load=load, worker=worker)


def serve(gateway: Gateway, config: Config, listening: socket.socket) -> None:
    """Serve until a signal, then let running requests finish. SIGHUP reads the configuration anew."""
    server = uvicorn.Server(server_config(gateway, config))
    log_to_stderr()
    # uvicorn repeats the signal to these after its shutdown; the default ones would kill the process.
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, server.handle_exit)
    signal.signal(signal.SIGHUP, lambda *_: reload(gateway))
    server.run(sockets=[listening])


def server_config(gateway: Gateway, config: Config) -> uvicorn.Config:
    """How uvicorn holds the sockets; the connections are the gateway's own."""
    limits = config.gateway
    return uvicorn.Config(
        gateway.app,
        loop="uvloop",
        http=gateway.protocol,  # type: ignore[arg-type]
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=round(limits.shutdown_timeout_s),
        ssl_certfile=limits.tls_certificate,
        ssl_keyfile=limits.tls_key,
    )


def reload(gateway: Gateway) -> None:
    """Take the file as it is now; one that cannot be used changes nothing."""
    events = logging.getLogger(EVENTS)
    try:
        gateway.reload()
    except (ConfigError, CardError) as error:
        events.error("the configuration was not changed: %s", error)
    else:
        events.info("the configuration was read anew")


if __name__ == "__main__":
    sys.exit(main())
