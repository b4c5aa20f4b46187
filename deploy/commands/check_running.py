"""What ``tiercel doctor`` looks at of processes: who has the ports, whether engines answer, and what those
that were killed have left."""

from __future__ import annotations

import fcntl
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

import psutil

from deploy.commands.findings import Finding, Findings, Subject, failure, ok, warning
from deploy.ports import port_in_use, why_not
from gateway.config import shown_url, slug
from gateway.routing.discovery import PREFIX
from gateway.telemetry.engines import ENGINES_FILE, engine_pids

PROBE_S = 3.0
SKEW_S = 5.0
"""Between clocks; the Date header has whole seconds."""
PROBES = 16


@dataclass(frozen=True)
class Owner:
    """Who listens on a port. ``pid`` is None for another user's process that may not be looked at."""

    pid: int | None
    command: tuple[str, ...] = ()
    directory: Path = Path("/")

    def __str__(self) -> str:
        if self.pid is None:
            return "a process of another user"
        return f"process {self.pid} ({' '.join(self.command)[:60] or 'unknown'})"

    def gateway_of(self, path: Path) -> bool:
        """Whether it is a gateway with the configuration ``path``."""
        words = self.command
        if not any(words[n : n + 2] == ("-m", "gateway") for n in range(len(words))):
            return False
        named = [words[n + 1] for n, word in enumerate(words[:-1]) if word == "--config"] or ["tiercel.yaml"]
        return (self.directory / named[0]).resolve() == path.resolve()


def owner(host: str, port: int) -> Owner | None:
    """None where the port is free."""
    for one in psutil.net_connections(kind="tcp"):
        if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr[1] == port:
            try:
                process = psutil.Process(one.pid) if one.pid else None
                if process is not None:
                    return Owner(process.pid, tuple(process.cmdline()), Path(process.cwd()))
            except psutil.Error:
                return Owner(one.pid)
            return Owner(None)
    return Owner(None) if port_in_use(host, port) else None


def check_ports(subject: Subject) -> Findings:
    """Free, or taken by the process that they are for."""
    config = subject.config
    gateway = config.gateway
    taken = owner(gateway.host, gateway.port)
    if taken is None and (why := why_not(gateway.host, gateway.port, "gateway.port")):
        what, _, fix = why.partition("; ")
        yield failure(what, fix)
    elif taken is None:
        yield ok(f"gateway.port {gateway.port} is free: the gateway does not run")
    elif taken.gateway_of(subject.path):
        yield ok(f"gateway.port {gateway.port}: the gateway runs, process {taken.pid}")
    else:
        yield failure(f"gateway.port {gateway.port} is taken by {taken}", _free(taken, "gateway.port"))
    pids = {variant: pid for (variant, _), pid in engine_pids(config.run_dir).items()}
    free = []
    for variant in subject.local():
        model, short = subject.of(variant)
        port = model.ports[short]
        taken = owner(model.engine.host, port)
        if taken is None:
            free.append(str(port))
        elif pids.get(variant) in _lineage(taken.pid):
            yield ok(f"port {port}: the engine of {variant} runs, process {taken.pid}")
        else:
            yield failure(
                f"port {port} of the engine of {variant} is taken by {taken}",
                _free(taken, "engine.base_port"),
            )
    if free:
        yield ok(f"engines' ports {', '.join(free)} are free: they do not run")


def _free(taken: Owner, key: str) -> str:
    stop = "stop what listens there" if taken.pid is None else f"kill {taken.pid}"
    return f"{stop}; or set {key} to another"


def _lineage(pid: int | None) -> set[int]:
    """A process and those that it comes from."""
    try:
        return {pid, *(one.pid for one in psutil.Process(pid).parents())} if pid else set()
    except psutil.Error:
        return {pid} if pid else set()


def check_engines(subject: Subject) -> Findings:
    """Every replica answers, serves the model, and has the same time."""
    config = subject.config
    local, running = set(subject.local()), {variant for variant, _ in _living(subject)}
    asked = [(variant, url) for variant in config.served for url in _addresses(config.replicas(variant))]
    with ThreadPoolExecutor(PROBES) as pool:
        answers = list(pool.map(lambda one: _probe(one[1]), asked))
    idle = []
    for (variant, url), answer in zip(asked, answers, strict=True):
        name = f"{variant} at {shown_url(url)}"
        if answer.error is None:
            yield _judged(name, answer, subject.of(variant)[0].name)
        elif variant in local and variant not in running:
            idle.append(variant)
        else:
            model, short = subject.of(variant)
            log = f"tail {model.log(short)}"
            fix = log if variant in local else f"start it, or take it out of pools.{variant}"
            yield failure(f"{name} does not answer: {answer.error}", fix)
    if idle:
        yield ok(f"not running: {', '.join(idle)}; `tiercel up` starts them")


@dataclass(frozen=True)
class Answer:
    """Of one engine. ``skew_s``: its clock ahead of this one; ``models``: what it serves, if it says so."""

    error: str | None = None
    skew_s: float | None = None
    models: tuple[str, ...] | None = None


def _judged(name: str, answer: Answer, model: str) -> Finding:
    if answer.models is not None and model not in answer.models:
        serves = ", ".join(answer.models) or "nothing"
        return failure(f"{name} serves {serves}, not {model}", f"start it with --served-model-name {model}")
    if answer.skew_s is not None and abs(answer.skew_s) > SKEW_S:
        text = f"{name}: its clock is {answer.skew_s:+.0f} s off; logs and charts do not fit together"
        return warning(text, "timedatectl set-ntp true")
    return ok(f"{name} answers")


def _addresses(urls: tuple[str, ...]) -> Iterator[str]:
    """Base URLs; names that stand for several replicas are looked up."""
    for url in urls:
        if not url.startswith(PREFIX):
            yield url
            continue
        parts = urlsplit(url.removeprefix(PREFIX))
        try:
            found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
        except OSError:
            yield url.removeprefix(PREFIX)  # which then says that it cannot be resolved
            continue
        for address in sorted({str(one[4][0]) for one in found}):
            host = f"[{address}]" if ":" in address else address
            yield f"{parts.scheme}://{host}:{parts.port or 80}"


def _probe(url: str) -> Answer:
    opener = build_opener(ProxyHandler({}))
    try:
        began = time.time()
        with opener.open(url + "/health", timeout=PROBE_S) as health:
            date = health.headers.get("date")
        middle = (began + time.time()) / 2
        skew = None if date is None else parsedate_to_datetime(date).timestamp() + 0.5 - middle
    except HTTPError as error:
        return Answer(f"/health says {error.code}")
    except (OSError, ValueError, TypeError) as error:
        return Answer(str(getattr(error, "reason", error)))
    try:
        with opener.open(url + "/v1/models", timeout=PROBE_S) as listed:
            models = tuple(str(one["id"]) for one in json.load(listed)["data"])
    except (OSError, ValueError, KeyError, TypeError):
        models = None  # an engine need not say it
    return Answer(None, skew, models)


def _living(subject: Subject) -> Iterator[tuple[str, psutil.Process]]:
    """Engines of the run directory's list whose processes live. A process that began after the list was
    written is another one with the same number."""
    path = subject.config.run_dir / ENGINES_FILE
    for (variant, _), pid in engine_pids(subject.config.run_dir).items():
        try:
            process = psutil.Process(pid)
            if process.create_time() <= path.stat().st_mtime + 1 and process.status() != psutil.STATUS_ZOMBIE:
                yield variant, process
        except (psutil.Error, OSError):
            continue


def check_leftovers(subject: Subject) -> Findings:
    """What processes leave that were killed."""
    config, found = subject.config, False
    listed, living = engine_pids(config.run_dir), dict(_living(subject))
    if (gone := sorted({variant for variant, _ in listed} - living.keys())) and not living:
        found = True
        path = config.run_dir / ENGINES_FILE
        yield warning(f"{path} names engines that do not run: {', '.join(gone)}", f"rm {path}")
    for variant, process in living.items():
        parent = process.parent()
        if parent is None or parent.pid == 1:
            found = True
            yield warning(
                f"the engine of {variant} (process {process.pid}) has no supervisor", f"kill {process.pid}"
            )
    for path in sorted((config.run_dir / "workers").glob("*.sock")):
        if not _listening(path):
            found = True
            yield warning(f"{path} is of a worker that does not run", f"rm {path}")
    for model in config.each():
        for path in sorted(model.variants_dir.glob(".partial-*")):
            variant = path.name.removeprefix(".partial-").partition("@")[0]
            if not _held(model.variants_dir / ".locks" / variant):
                found = True
                yield warning(f"{path} was left by a run that was killed", f"rm -r {path}")
    known = {slug(name) for name in config.models}
    for path in sorted(config.variants_dir.glob("*/current")):
        if path.is_symlink() and path.parent.name not in known:
            found = True
            where = config.variants_dir / slug(config.default_model)
            yield warning(
                f"{path.parent} is of the time when a file had one model, and is not read",
                f"mkdir -p {where}; mv {path.parent} {where}/",
            )
    if not found:
        yield ok("nothing is left of processes that were killed")


def _listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_S)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _held(lock: Path) -> bool:
    """Whether a process is making or changing the variant."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
