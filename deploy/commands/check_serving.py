"""What ``tiercel doctor`` looks at of an installation: files, ports, the watch's store, engines, and what
killed processes have left."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import ProxyHandler, build_opener

import psutil
from sqlalchemy import create_engine, inspect, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from deploy.commands.check_machine import existing
from deploy.commands.findings import Finding, Findings, Subject, failure, ok, warning
from deploy.engine import port_in_use
from deploy.hub import is_there
from gateway.config import ConfigError, shown_url, slug
from gateway.quality.tables import FACTS, FORMAT
from gateway.quality.watch import store_url
from gateway.routing.discovery import PREFIX
from gateway.telemetry.engines import ENGINES_FILE, engine_pids
from quantize.card import CardError, Outcome, read_card, refuse_broken, variant_directory
from quantize.core.recipes import RECIPES
from quantize.gate.judgement import judge

PROBE_S = 3.0
STORE_S = 5
SKEW_S = 5.0
"""Between clocks; the Date header has whole seconds."""
SOON_S = 14 * 86_400
PROBES = 16


def check_files(subject: Subject) -> Findings:
    """What the configuration names beside variants."""
    config, well = subject.config, True
    named = {"quality.classifier": config.quality.classifier}
    for model in config.each():
        key = f"models.{model.name}"
        if model.hub is None and not (model.path / "config.json").is_file():
            fix = f"set {key}.path to a checkpoint's directory"
            yield warning(f"{key}.path: {model.path} holds no checkpoint; no variant can be made", fix)
            well = False
        elif not is_there(model):
            yield ok(f"{key}.hub: {model.hub} is not fetched yet; `tiercel quantize` does it")
        named[f"{key}.calibration"] = model.calibration
    for name, role in config.roles.items():
        named |= {f"roles.{name}.tasks": role.tasks, f"roles.{name}.long_context": role.long_context}
    missing = [f"{key}: {path}" for key, path in named.items() if path is not None and not path.exists()]
    for one in missing:
        yield warning(f"{one} does not exist", f"correct it in {subject.path}")
        well = False
    for provider in config.providers:
        variable = provider.api_key_env
        if variable is not None and not os.environ.get(variable):
            text = f"providers: the environment has no {variable}, the key of {provider.model}"
            yield warning(text, f"export {variable}=…")
            well = False
    if well:
        yield ok("models, tasks and calibration are where the configuration says")


def check_variants(subject: Subject) -> Findings:
    """Every served variant has its files and a card, and passed a gate."""
    for variant in subject.config.served:
        yield _variant(subject, variant)


def _variant(subject: Subject, variant: str) -> Finding:
    model, short = subject.of(variant)
    of = f" --model {model.name}" if len(subject.config.models) > 1 else ""
    make = f"tiercel quantize{of} {short}" if short in {*RECIPES, model.reference} else "tiercel variants"
    try:
        directory = variant_directory(model.variants_dir, short)
        card = read_card(directory)
        refuse_broken(card)
    except CardError as error:
        return failure(str(error), make)
    missing = [name for name in card.files if not (directory / name).is_file()]
    if missing:
        return failure(f"{directory}: {missing[0]} is listed in the card but missing", make)
    text = f"{variant} {card.version}, {card.weight_bytes / 1e6:,.1f} MB"
    if short == model.reference:
        return ok(f"{text}: the reference")
    if card.evaluation is None:
        return warning(f"{text}: was never measured, so no role may be routed to it", make)
    verdicts = {name: judge(card, name, role.budget).outcome for name, role in model.roles.items()}
    passed = [name for name, outcome in verdicts.items() if outcome is Outcome.PASSED]
    others = [f"{n} ({o.value.replace('_', ' ')})" for n, o in verdicts.items() if o is not Outcome.PASSED]
    if not passed:
        text = f"{text}: serves no role: {', '.join(others)}"
        return warning(text, f"tiercel variants show {variant}; or take it out of `serve`")
    return ok(f"{text}: serves {', '.join(passed)}" + (f"; not {', '.join(others)}" if others else ""))


def check_permissions(subject: Subject) -> Findings:
    """Directories that are written to, and who may read the TLS key."""
    config = subject.config
    for name, path in (("run_dir", config.run_dir), ("variants_dir", config.variants_dir)):
        place = existing(path)
        if os.access(place, os.W_OK | os.X_OK):
            yield ok(f"{name}: {path} " + ("can be written to" if place == path else "will be made"))
        elif name == "run_dir":
            yield failure(f"{name}: {place} cannot be written to", f"chown $(id -u) {place}; or set {name}")
        else:  # as in a cluster, where a job writes it
            yield warning(
                f"{name}: {place} is read-only; no variant can be made here", f"chown $(id -u) {place}"
            )
    if config.gateway.tls_certificate and config.gateway.tls_key:
        yield from _tls(config.gateway.tls_certificate, config.gateway.tls_key)


def _tls(certificate: Path, key: Path) -> Findings:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "reason", None) or error.strerror or error
        text = f"gateway.tls_certificate {certificate} and tls_key {key} cannot be used: {reason}"
        yield failure(text, f"openssl x509 -noout -pubkey -in {certificate}; openssl pkey -pubout -in {key}")
        return
    if key.stat().st_mode & 0o077:
        yield warning(f"gateway.tls_key: others may read {key}", f"chmod 600 {key}")
    if find_spec("cryptography") is None:
        yield ok("the certificate and its key belong together")
        return
    from cryptography import x509

    ends = x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
    left = (ends - datetime.now(UTC)).total_seconds()
    if left < SOON_S:
        what = "has expired" if left < 0 else "expires soon"
        yield (failure if left < 0 else warning)(
            f"gateway.tls_certificate: {certificate} {what}: {ends:%Y-%m-%d %H:%M} UTC",
            "put a new one there and start the gateway anew",
        )
    else:
        yield ok(f"the certificate and its key belong together; valid until {ends:%Y-%m-%d}")


def check_store(subject: Subject) -> Findings:
    """The watch's store answers and has tables that this version reads. It is only read."""
    if not subject.config.watch.enabled:
        yield ok("the watch is off (watch.enabled)")
        return
    try:
        url = make_url(store_url(subject.config))
    except ConfigError as error:
        yield failure(str(error), f"export {subject.config.watch.store_env}=postgresql+psycopg://…")
        return
    shown = url.render_as_string(hide_password=True)
    arguments: dict[str, object] = {}
    if url.get_backend_name() == "sqlite":
        if url.database in (None, "", ":memory:"):
            yield warning(f"{shown}: in memory; a restart forgets who was demoted", "take watch.store out")
            return
        if not Path(str(url.database)).exists():
            yield ok(f"{shown} will be made when the gateway starts")
            return
        # Read-only, so that looking makes no table; and where nobody has it open, no file beside it either.
        still = {} if Path(f"{url.database}-wal").exists() else {"immutable": "1"}
        query = {"mode": "ro", "uri": "true", **still}
        url = url.set(database=f"file:{quote(str(url.database))}", query=query)
    elif url.get_backend_name() == "postgresql":
        arguments["connect_timeout"] = STORE_S
    try:
        engine = create_engine(url, poolclass=NullPool, connect_args=arguments)
        with engine.connect() as connection:
            found = None
            if inspect(connection).has_table(FACTS.name):
                found = connection.scalar(select(FACTS.c.value).where(FACTS.c.name == "format"))
    except ImportError as error:
        yield failure(f"{shown}: {error}", "pip install 'tiercel[postgresql]'")
        return
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        yield failure(f"{shown}: {reason}", "see that the database runs and lets this user in")
        return
    if found not in (None, FORMAT):
        yield failure(
            f"{shown} has tables of format {found}, not {FORMAT}", "set watch.store to another database"
        )
    else:
        yield ok(f"{shown} answers" + ("" if found else "; its tables will be made"))


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
    if taken is None:
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
