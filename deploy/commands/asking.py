"""What is asked of a running gateway, by every command that does: where it is, with which key, and what to
say when it does not answer."""

from __future__ import annotations

import argparse
import json
import os
import ssl
from collections.abc import Mapping
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener

from deploy.commands import Run, add_command
from deploy.door import Door
from deploy.ports import address
from gateway.config import Config, load_config
from gateway.errors import GatewayError

KEY = "TIERCEL_KEY"
TIMEOUT_S = 120.0


class NoAnswerError(GatewayError):
    """Nothing answers at the gateway's address."""


class RefusedError(GatewayError):
    """The gateway's refusal, in its own words. ``status`` is that of its answer."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def add_asking(commands: Any, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """A command that asks a running gateway."""
    command = add_command(commands, name, run, text)
    command.add_argument("--url", help="the gateway (default: where the YAML file says that it listens)")
    command.add_argument("--key", help=f"an admin's key (default: the environment variable {KEY})")
    return command


class GatewayClient:
    """Requests to one gateway. They raise NoAnswerError, or RefusedError with what the gateway says."""

    def __init__(self, url: str, key: str | None, local: bool, timeout_s: float = TIMEOUT_S) -> None:
        """``local``: the address is the configuration's own. Then no proxy leads to it, and its certificate
        is of the name that clients use, not of this machine."""
        self.url = url.rstrip("/")
        self._headers = {"content-type": "application/json"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"
        self._timeout_s = timeout_s
        context = ssl.create_default_context()
        if local:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        proxies = [ProxyHandler({})] if local else []
        self._opener = build_opener(*proxies, HTTPSHandler(context=context))

    def ask(
        self,
        path: str,
        order: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        also: int | None = None,
    ) -> dict[str, Any]:
        """The JSON of an answer; with an ``order`` a POST. ``also``: a status that is an answer too."""
        text = self.text(path, order, headers, also)
        try:
            found: dict[str, Any] = json.loads(text)
        except ValueError:
            raise NoAnswerError(f"{self.url}{path} does not answer as a gateway does; give --url") from None
        return found

    def text(
        self,
        path: str,
        order: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        also: int | None = None,
    ) -> str:
        """The same as it comes."""
        data = None if order is None else json.dumps(order).encode()
        try:
            asked = Request(self.url + path, data, {**self._headers, **(headers or {})})
            with self._opener.open(asked, timeout=self._timeout_s) as answer:
                return str(answer.read().decode())
        except HTTPError as error:
            body = error.read().decode(errors="replace")
            if error.code == also:
                return body
            raise self._refused(error.code, body) from None
        except (URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise NoAnswerError(
                f"{self.url} does not answer ({reason}); start it with `tiercel up`"
            ) from None

    def _refused(self, status: int, body: str) -> RefusedError:
        try:
            words = json.loads(body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            words = f"{self.url} answered {status}, not as a gateway does; give --url"
        hint = f"; give an admin's key with --key or {KEY}" if status in (401, 403) else ""
        return RefusedError(words + hint, status)


def client(options: argparse.Namespace, timeout_s: float = TIMEOUT_S) -> GatewayClient:
    """Of the gateway that ``options`` or the YAML file name. Raises ConfigError where the file is needed and
    cannot be used."""
    url = options.url or address(load_config(options.config))
    return GatewayClient(url, options.key or os.environ.get(KEY), options.url is None, timeout_s)


def door(options: argparse.Namespace, config: Config) -> Door:
    """The same for whoever asks a model through it, whether it runs or not."""
    key = options.key or os.environ.get(KEY)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return Door((options.url or address(config)).rstrip("/"), headers, local=options.url is None)
