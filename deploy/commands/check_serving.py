"""What ``tiercel doctor`` looks at of an installation: files, variants, permissions, the watch's store."""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import create_engine, inspect, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from deploy.commands.check_machine import existing
from deploy.commands.findings import Finding, Findings, Subject, failure, ok, warning
from deploy.hub import is_there
from deploy.models import first_models
from gateway.config import ConfigError
from gateway.quality.tables import FACTS, FORMAT
from gateway.quality.watch import store_url
from quantize.card import CardError, Outcome, read_card, refuse_broken, variant_directory
from quantize.core.recipes import RECIPES
from quantize.gate.judgement import judge_across

STORE_S = 5
SOON_S = 14 * 86_400


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
    first = first_models(model)
    verdicts = {
        name: judge_across(card, name, role.budget, first[name]).outcome for name, role in model.roles.items()
    }
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
