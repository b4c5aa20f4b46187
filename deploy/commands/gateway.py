"""``tiercel keys`` and ``tiercel route``: who may use the gateway, and where it would send a request."""

from __future__ import annotations

import argparse
import secrets
from typing import Any

import yaml

from deploy.commands import add_command, add_json, print_json
from gateway.cards import load_cards
from gateway.config import ApiKey, Config, ConfigError, load_config
from gateway.identity import Identities, hash_of
from gateway.proxy.fields import RequestFields
from gateway.routing.choices import Explanation
from gateway.routing.pools import Pools
from gateway.routing.router import Router


def add_gateway(commands: Any) -> None:
    text = "API keys"
    keys = commands.add_parser("keys", help=text, description=text)
    kinds = keys.add_subparsers(required=True, metavar="command")
    text = "make a key: its lines for the YAML file; the key itself is shown this once"
    new = kinds.add_parser("new", help=text, description=text)
    new.add_argument("name", help="whose it is")
    new.add_argument("--tenant", default="", help="keep its prefix cache apart from other tenants'")
    new.add_argument("--role", help="the role of all its requests")
    new.add_argument("--admin", action="store_true", help="it may change the configuration")
    new.set_defaults(run=new_key)

    routing = add_command(commands, "route", route, "say which variant would serve a request, and why")
    routing.add_argument("--role", help="as a request's x-agent-role (default: the default role)")
    routing.add_argument("--model", help="as in a request (default: what the role may have)")
    add_json(routing)


def new_key(options: argparse.Namespace) -> None:
    if options.role == "":
        raise ConfigError("--role: '' names no role; leave it out, or give one of the file's")
    secret = "tk-" + secrets.token_urlsafe(32)
    entry: dict[str, Any] = {"name": options.name, "sha256": hash_of(secret)}
    entry |= {name: value for name in ("tenant", "role", "admin") if (value := getattr(options, name))}
    try:
        ApiKey.model_validate(entry)
    except ValueError:
        fix = "take letters, digits, '.', '_' and '-'"
        raise ConfigError(f"name: {options.name!r} cannot be used; {fix}") from None
    print(f"# {secret}\n# The line above is the key. It is kept nowhere; what follows belongs under `keys:`.")
    print(yaml.safe_dump([entry], sort_keys=False), end="")


def route(options: argparse.Namespace) -> None:
    config = load_config(options.config)
    model = options.model or options.role or config.default_model
    found = explain(config, options.role, model)
    if options.json:
        steps = [
            {
                "variant": s.variant,
                "memory_bytes": s.memory_bytes,
                "tokens_per_s": s.tokens_per_s,
                "verdict": s.verdict,
                "why": list(s.why),
            }
            for s in found.considered
        ]
        said = {
            "role": found.role,
            "model": found.model,
            "ladder": found.ladder,
            "reason": found.reason.value,
        }
        print_json(said | {"considered": steps})
        return
    named = "" if found.model == found.role else f", model {found.model}"
    print(f"role {found.role}{named}: {' → '.join(found.ladder)} ({found.reason.value})")
    for step in found.considered:
        speed = f"{step.tokens_per_s:8.0f} tokens/s" if step.tokens_per_s else f"{'–':>8}         "
        print(f"  {step.variant:12} {step.memory_bytes / 1e6:9.1f} MB {speed}  {step.verdict}")
        for why in step.why:
            print(f"      {why}")


def explain(config: Config, role: str | None, model: str) -> Explanation:
    """The gateway's own decision, from the cards. Raises GatewayError for what it would refuse."""
    router = Router(config, load_cards(config), Pools(config, lambda: 0.0))
    headers = {} if role is None else {"x-agent-role": role}
    open_config = config.model_copy(update={"keys": ()})
    caller = Identities(open_config).sender(headers).caller(RequestFields(model))
    return router.explain(caller, model)
