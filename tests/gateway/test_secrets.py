"""Secrets and prompts stand in no answer, log, or repr; what is hidden stays as it is when sent back."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from gateway_stack import Stack, eventually, make_config, running_gateway, write_variants
from gateway_stack import settings as yaml_of
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import HIDDEN, Config, ConfigError, parse_config, shown, shown_url, with_secrets
from gateway.errors import UnexpectedError, UpstreamRefusedError
from gateway.identity import hash_of

SECRET = "S3cr3t"
SECRETS: dict[str, Any] = {
    "keys": [
        {"name": "one", "sha256": hash_of(SECRET + "1"), "admin": True},
        {"name": "two", "sha256": hash_of(SECRET + "2")},
    ],
    "pools": {
        "int8": [f"http://me:{SECRET}1@10.0.0.1:8000/x", f"http://10.0.0.2:8000?token={SECRET}2"],
        "bf16": [f"dns+http://{SECRET}3@engines:8000", "http://10.0.0.4:8000"],
    },
    "providers": [
        {"model": "gpt", "litellm_model": "openai/gpt", "api_base": f"https://me:{SECRET}4@host/v1"},
        {"model": "plain", "litellm_model": "openai/plain", "api_base": "https://host/v1"},
    ],
    "engine": {
        "env": {"HF_TOKEN": f"{SECRET}5", "OMP_NUM_THREADS": "1"},
        "extra_args": [
            *("--api-key", f"{SECRET}6", f"{SECRET}7", "--seed", "7"),
            *(f"--hf-token={SECRET}8", "--tokenizer", "path", "--max-num-batched-tokens", "4096"),
        ],
    },
    "watch": {
        "store": f"postgresql+psycopg://me:{SECRET}9@db/tiercel?password={SECRET}10&sslmode=require",
        "webhook": f"https://hooks.example.com/services/T0/{SECRET}11",
    },
}


def hashes_hidden(text: str, config: Config) -> bool:
    return SECRET not in text and not any(key.sha256 in text for key in config.keys)


def test_what_is_shown_has_no_secret_and_all_else() -> None:
    config = make_config(**SECRETS)
    found = shown(config)
    assert hashes_hidden(json.dumps(found), config)
    assert hashes_hidden(repr(config), config)
    assert hashes_hidden(str(config.engine) + str(config.keys) + str(config.providers), config)
    assert found["pools"]["assistant:int8"] == [
        f"http://me:{HIDDEN}@10.0.0.1:8000/x",
        f"http://10.0.0.2:8000?token={HIDDEN}",
    ]
    assert found["engine"]["extra_args"][3:5] == ["--seed", "7"]
    assert found["engine"]["extra_args"][6:] == ["--tokenizer", "path", "--max-num-batched-tokens", "4096"]
    assert found["engine"]["env"].keys() == {"HF_TOKEN", "OMP_NUM_THREADS"}
    assert found["watch"]["webhook"] == f"https://hooks.example.com/{HIDDEN}"
    plain = make_config(pools={"int8": ["http://10.0.0.2:8000"]})
    assert shown(plain) == plain.model_dump(mode="json"), "nothing else is changed"


def test_what_is_shown_can_be_sent_back() -> None:
    config = make_config(**SECRETS)
    for text in (json.dumps(shown(config)), yaml.safe_dump(shown(config), allow_unicode=True)):
        assert parse_config(with_secrets(text, config), "sent", Path()).model_dump() == absolute(config)


def absolute(config: Config) -> dict[str, Any]:
    """What a configuration becomes when it is read from a text."""
    return parse_config(config.model_dump_json(), "text", Path()).model_dump()


@settings(deadline=None, max_examples=40)
@given(st.randoms(use_true_random=False))
def test_members_that_move_keep_their_secrets(rng: random.Random) -> None:
    config = make_config(**SECRETS)
    found = shown(config)
    for members in (found["keys"], found["providers"], *found["pools"].values()):
        rng.shuffle(members)
        if len(members) > 1 and rng.random() < 0.5:
            members.pop()
    now = parse_config(with_secrets(json.dumps(found), config), "sent", Path())
    assert {key.name: key.sha256 for key in now.keys}.items() <= {
        key.name: key.sha256 for key in config.keys
    }.items()
    assert set(now.providers) <= set(config.providers)
    assert all(set(now.pools[variant]) <= set(config.pools[variant]) for variant in now.pools)
    assert HIDDEN not in now.model_dump_json()


def pool(config: dict[str, Any]) -> None:
    config["pools"]["assistant:int8"][0] = f"http://me:{HIDDEN}@10.0.0.9:8000/x"


def stranger(config: dict[str, Any]) -> None:
    config["keys"][0]["name"] = "somebody"


def variable(config: dict[str, Any]) -> None:
    config["engine"]["env"]["OTHER"] = HIDDEN


def webhook(config: dict[str, Any]) -> None:
    config["watch"]["webhook"] = f"https://elsewhere.example/{HIDDEN}"


def same_for_both(config: dict[str, Any]) -> None:
    config["keys"].append(config["keys"][0] | {"name": "three"})


@pytest.mark.parametrize("change", [pool, stranger, variable, webhook, same_for_both])
def test_a_secret_that_cannot_be_known_is_asked_for(change: Callable[[dict[str, Any]], None]) -> None:
    """Never guessed: another's would be sent to a host that the sender names."""
    config = make_config(**SECRETS)
    found = shown(config)
    change(found)
    with pytest.raises(ConfigError):
        parse_config(with_secrets(json.dumps(found), config), "sent", Path())


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": [{"name": "a", "sha256": f"sk-{SECRET}"}]},
        {"pools": {"int8": [f"ftp://me:{SECRET}@host"]}},
        {"engine": {"env": {"HF_TOKEN": {"a": SECRET}}}},
        {"engine": {"extra_args": f"--api-key {SECRET}"}},
        {"watch": {"webhook": [SECRET]}},
        {"watch": {"store": f"no url {SECRET}"}},
        {"keys": f"sk-{SECRET}"},
        {"keys": [f"sk-{SECRET}"]},
        {"engine": SECRET},
        {"watch": f"postgresql://me:{SECRET}@host/db"},
        {"providers": [{"model": "a", "litellm_model": "b", "api_base": {"url": SECRET}}]},
    ],
)
def test_errors_in_the_file_show_no_secret(changes: dict[str, Any]) -> None:
    raw = make_config().model_dump(mode="json") | changes
    with pytest.raises(ConfigError) as caught:
        parse_config(yaml.safe_dump(raw), "file", Path())
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shows"),
    [
        ("http://10.0.0.1:8000", "http://10.0.0.1:8000"),
        ("http://me:pw@h:1/a", f"http://me:{HIDDEN}@h:1/a"),
        ("http://pw@[::1]:1", f"http://{HIDDEN}@[::1]:1"),
        ("http://h/a?b=c&d", f"http://h/a?b={HIDDEN}&{HIDDEN}"),
        ("http://me:p@w@h", f"http://me:{HIDDEN}@h"),
        ("sqlite:////var/lib/watch.db", "sqlite:////var/lib/watch.db"),
        ("sqlite://", "sqlite://"),
        ("http://[broken", HIDDEN),
        ("", ""),
    ],
)
def test_urls_are_shown_without_passwords(url: str, shows: str) -> None:
    assert shown_url(url) == shows


def test_an_error_that_has_no_secret_shows_what_was_given() -> None:
    raw = make_config().model_dump(mode="json")
    raw["gateway"]["port"] = "eight"
    with pytest.raises(ConfigError, match=r"gateway.port: .*, got 'eight'"):
        parse_config(yaml.safe_dump(raw), "file", Path())


async def test_put_of_what_get_showed_changes_nothing(tmp_path: Path) -> None:
    write_variants(tmp_path)
    async with running_gateway(keys=SECRETS["keys"]) as stack:
        urls = {v: list(pool) for v, pool in stack.gateway.plane.snapshot.config.pools.items()}
        urls["assistant:int8"] = [
            url.replace("http://", f"http://me:{SECRET}@") for url in urls["assistant:int8"]
        ]
        text = yaml_of(
            tmp_path,
            urls,
            keys=SECRETS["keys"],
            engine=SECRETS["engine"],
            gateway=stack.gateway.plane.snapshot.config.gateway.model_dump(mode="json"),
        )
        headers = {"authorization": f"Bearer {SECRET}1", "content-type": "application/yaml"}
        where = stack.url + "/admin/config"
        async with stack.http.put(where, data=text, headers=headers) as response:
            assert response.status == 200, await response.text()
        before = stack.gateway.plane.snapshot.config
        async with stack.http.get(where, headers=headers) as response:
            seen = await response.text()
        assert hashes_hidden(seen, before)
        async with stack.http.put(where, data=seen, headers=headers) as response:
            assert response.status == 200, await response.text()
        assert stack.gateway.plane.snapshot.config is not before
        assert stack.gateway.plane.snapshot.config == before


def admin_of(stack: Stack) -> dict[str, str]:
    return {"authorization": f"Bearer {SECRET}1"}


async def test_readiness_shows_addresses_to_admins_alone() -> None:
    async with running_gateway(keys=SECRETS["keys"]) as stack:
        ports = [replica.url.rpartition(":")[2] for replica in stack.gateway.plane.snapshot.pools.replicas()]

        async def readiness(headers: dict[str, str]) -> tuple[int, str]:
            async with stack.http.get(stack.url + "/readiness", headers=headers) as response:
                return response.status, await response.text()

        async def ready() -> bool:
            return (await readiness({}))[0] == 200

        await eventually(ready)
        for headers in ({}, {"authorization": "Bearer nobody"}, {"authorization": f"Bearer {SECRET}2"}):
            status, text = await readiness(headers)
            assert status == 200, "a probe has no key, or an old one"
            assert json.loads(text) == {"ready": True, "unserved": [], "not_reachable": []}
            assert not any(port in text for port in ports)
        detail = json.loads((await readiness(admin_of(stack)))[1])
        assert (
            detail["pools"]["assistant:bf16"]["replicas"]["assistant:bf16-0"]["url"].rpartition(":")[2]
            in ports
        )
    async with running_gateway() as stack:
        async with stack.http.get(stack.url + "/readiness") as response:
            assert "pools" in await response.json(), "without keys this machine is an admin"
        async with stack.http.get(stack.url + "/readiness", headers={"host": "evil.example"}) as response:
            assert "pools" not in await response.json()


MARKER = "my own secret words"


def test_a_refusal_says_in_the_log_what_kind_it_is() -> None:
    said = {
        "message": f"cannot read {MARKER!r}",
        "type": "BadRequestError",
        "code": 400,
        "param": "messages[0]",
    }
    refused = UpstreamRefusedError(400, {"error": said})
    assert MARKER in refused.message
    assert refused.logged == (
        "the upstream refused the request with status 400: type BadRequestError, code 400, param messages[0]"
    )
    for body in (
        {"error": {"message": MARKER, "type": MARKER, "code": MARKER, "param": MARKER}},
        {"error": MARKER},
        {"detail": MARKER},
        {"error": {"type": {MARKER: 1}, "code": [MARKER]}},
        MARKER,
    ):
        assert MARKER not in UpstreamRefusedError(422, body).logged


def test_a_defect_says_in_the_log_where_it_is() -> None:
    try:
        b"\xff my own secret words".decode()
    except UnicodeDecodeError as error:
        found = UnexpectedError(error)
    assert found.logged.startswith("UnicodeDecodeError at ")
    assert MARKER not in found.logged
    assert "test_secrets.py" in found.logged


async def test_the_log_has_no_word_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused, and by whom: the client is told, the log says what kind of thing it was."""
    async with running_gateway(keys=[{**key, "models": ["assistant"]} for key in SECRETS["keys"]]) as stack:
        lines: list[Any] = []
        monkeypatch.setattr(stack.gateway.plane.log, "write", lines.append)
        headers = admin_of(stack)
        for body, more in (
            ({"model": MARKER}, {}),
            ({"model": f"assistant:{MARKER}"}, {}),
            ({}, {"x-agent-role": MARKER}),
            ({}, {"x-agent-name": MARKER, "x-session-id": MARKER, "x-request-id": MARKER}),
            ({"user": MARKER, "metadata": {"agent_role": MARKER}}, {}),
            ({"priority": MARKER}, {}),
            ({"stream": MARKER}, {}),
            ({"stream": True, "stream_options": MARKER}, {}),
            ({"stream": True, "stream_options": {"include_usage": MARKER}}, {}),
            ({"model": [MARKER]}, {}),
            ({}, {"content-encoding": MARKER}),
            ({"messages": [{"role": "user", "content": MARKER}]}, {}),
        ):
            async with stack.post(body, headers=headers | more) as response:
                await response.read()
        went_on = {"previous_response_id": MARKER, "input": MARKER}
        async with stack.post(went_on, "/v1/responses", headers=headers) as response:
            assert response.status == 400
            assert MARKER in await response.text(), "the client may know"
        for status in (400, 422, 500):
            for engine in stack.engines.values():
                engine.script.status, engine.script.message = status, f"what is {MARKER}?"
            async with stack.post(headers=headers) as response:
                assert response.status == (status if status < 500 else 502)
                assert (MARKER in await response.text()) is (status < 500), "the client may know"
        for engine in stack.engines.values():
            engine.script.status, engine.script.garbage = 200, True
            for replica in stack.gateway.plane.snapshot.pools.replicas():
                replica.breaker.answered()
        async with stack.post({"stream": True}, headers=headers) as response:
            await response.read()
        await eventually(lambda: len(lines) >= 17)
        assert MARKER not in repr(lines)
        assert "html" not in repr(lines)
