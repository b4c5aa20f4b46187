"""What a running gateway keeps: by consent alone, redacted, and never in anybody's way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from gateway_stack import (
    CHAT,
    OTHERS,
    Stack,
    addresses,
    eventually,
    make_config,
    running_gateway,
    settings,
    write_variants,
)

from gateway.identity import hash_of
from gateway.kept import keeper as keeper_module
from gateway.kept.cipher import cipher_of
from gateway.kept.conversation import LONGEST
from gateway.kept.store import KeptStore, store_url
from gateway.quality.process import CheckProcess
from gateway.quality.records import decode_answer
from gateway.quality.transcript import Transcript, read_object
from gateway.upstream.fake import FakeEngine, Script

ROLES: dict[str, Any] = {
    "intent_classifier": {"record": {"rate": 1.0}},
    "summarizer": {},
    "core": {"budget": {"min_weight_bits": 16}},
}
BATCH = {"reference": "batch", "rate": 1.0, "batch": {"most": 50}}
SECRET = "bob@example.com"


@contextlib.asynccontextmanager
async def keeping(tmp_path: Path, **changes: Any) -> AsyncIterator[Stack]:
    kept = changes.pop("kept", {})
    async with running_gateway(**{"run_dir": tmp_path, "roles": ROLES, "kept": kept} | changes) as stack:
        yield stack


def asked(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


async def ask(stack: Stack, body: dict[str, Any], role: str = "intent_classifier", **options: Any) -> None:
    async with stack.post(body, headers={"x-agent-role": role}, **options) as response:
        assert response.status == 200, await response.text()
        await response.read()


def count(stack: Stack, outcome: str, role: str = "intent_classifier", kind: str = "request") -> float:
    name = "tiercel_kept_conversations_total"
    return stack.sample(name, role=role, kind=kind, outcome=outcome)


def opened(tmp_path: Path) -> KeptStore:
    config = make_config(run_dir=tmp_path, kept={})
    return KeptStore(store_url(config), cipher_of(config))


def questions(tmp_path: Path) -> list[Any]:
    store = opened(tmp_path)
    found = [store.question(number) for number in store.ids("request")]
    store.close()
    return [one.asked for one in found if one is not None]


def contents(directory: Path) -> bytes:
    return b"".join(one.read_bytes() for one in directory.iterdir() if one.is_file())


async def test_what_a_role_agrees_to_is_kept_redacted_and_of_no_other_role(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with keeping(tmp_path, kept={"redact": [r"CUST-\d+"]}) as stack:
        schema = {"type": "object", "properties": {"a": {"type": "string"}}}
        body = asked(
            f"I am {SECRET}, CUST-77",
            user="bob",
            metadata={"session_id": "s"},
            max_tokens=9,
            chat_template_kwargs={"enable_thinking": False},
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )
        await ask(stack, body)
        await ask(stack, body)
        await ask(stack, asked("not agreed"), "summarizer")
        await ask(stack, asked("by name", model="assistant:int8"))
        await ask(stack, asked("with tools", tools=[{"type": "function", "function": {"name": "f"}}]))
        await ask(stack, asked("streamed", stream=True))
        await eventually(lambda: count(stack, "kept") == 2 and count(stack, "known") == 1)
        assert count(stack, "form") == 1
        async with stack.http.get(stack.url + "/admin/config") as response:
            said = await response.text()
        async with stack.http.get(stack.url + "/metrics") as response:
            said += await response.text()
    first, second = questions(tmp_path)
    assert first.messages == [{"role": "user", "content": "I am [email], [private]"}]
    assert (first.json_schema, first.max_tokens) == (schema, 9)
    assert first.template == {"enable_thinking": False}
    assert second.messages[0]["content"] == "streamed"
    assert SECRET not in caplog.text + said
    files = contents(tmp_path)
    assert SECRET.encode() not in files
    assert b"[email]" not in files


async def test_nothing_is_kept_without_the_section(tmp_path: Path) -> None:
    async with running_gateway(run_dir=tmp_path) as stack:
        await ask(stack, asked("hello"))
        await eventually(stack.settled)
    assert not (tmp_path / "kept.db").exists()
    assert not (tmp_path / "kept.key").exists()


async def test_a_sample_is_kept(tmp_path: Path) -> None:
    roles = {**ROLES, "intent_classifier": {"record": {"rate": 0.25}}}
    async with keeping(tmp_path, roles=roles, quality={"sample_rate": 0.0}) as stack:
        for batch in range(8):
            await asyncio.gather(*(ask(stack, asked(f"{batch} {n}")) for n in range(20)))
        await eventually(lambda: stack.settled() and not stack.gateway.keeper._waiting)
    assert 15 <= len(questions(tmp_path)) <= 70


async def test_a_failed_answer_is_not_kept(tmp_path: Path) -> None:
    async with keeping(tmp_path) as stack:
        for engine in stack.engines.values():
            engine.script.status = 400
        async with stack.post(asked("x"), headers={"x-agent-role": "intent_classifier"}) as response:
            assert response.status == 400
        await eventually(stack.settled)
    assert not (tmp_path / "kept.db").exists()


async def test_what_there_is_no_room_for_is_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckProcess, "submit", lambda *_, **__: None)
    async with keeping(tmp_path) as stack:
        await ask(stack, asked("x"))
        assert count(stack, "full") == 1
        await ask(stack, asked("x" * LONGEST))
        assert count(stack, "too_long") == 1


async def test_a_queue_that_is_full_drops_what_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "MOST_WAITING", 0)
    async with keeping(tmp_path) as stack:
        await ask(stack, asked("x"))
        await eventually(lambda: count(stack, "full") == 1)


async def test_a_store_that_fails_is_said_once_and_breaks_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keeper_module, "AGAIN_S", 0.01)
    monkeypatch.setenv("KEPT_KEY", "nonsense")
    async with keeping(tmp_path, kept={"key_env": "KEPT_KEY"}) as stack:
        for number in range(3):
            await ask(stack, asked(f"a particular {number}"))
            await eventually(lambda: count(stack, "store_down") == number + 1)  # noqa: B023
    assert caplog.text.count("nothing can be kept now") == 1
    assert "particular" not in caplog.text


async def test_what_is_too_old_goes_although_nothing_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "PRUNE_S", 0.01)
    async with keeping(tmp_path) as stack:
        await ask(stack, asked("x"))
        await eventually(lambda: count(stack, "kept") == 1)
    assert len(questions(tmp_path)) == 1
    async with keeping(tmp_path, kept={"days": 1e-9}):
        await eventually(lambda: not questions(tmp_path))


async def test_keeping_is_switched_on_by_a_reload(tmp_path: Path) -> None:
    write_variants(tmp_path / "variants")
    async with running_gateway(run_dir=tmp_path) as stack:
        await ask(stack, asked("before"))
        config = stack.gateway.plane.snapshot.config
        urls = {variant: list(config.replicas(variant)) for variant in config.served}
        more = {"run_dir": str(tmp_path), "gateway": {"port": config.gateway.port}, "roles": ROLES}

        async def put(**kept: str) -> tuple[int, str]:
            text = settings(tmp_path / "variants", urls, kept=kept, **more)
            headers = {"content-type": "application/yaml"}
            async with stack.http.put(stack.url + "/admin/config", data=text, headers=headers) as response:
                return response.status, await response.text()

        status, said = await put()
        assert status == 200, said
        status, said = await put(key_env="ANOTHER")
        assert status == 400
        assert "kept.key_env: cannot change while the gateway runs" in said
        await ask(stack, asked("after"))
        await eventually(lambda: count(stack, "kept") == 1)
    assert [one.messages[0]["content"] for one in questions(tmp_path)] == ["after"]


async def test_answers_wait_for_the_reference_without_what_says_who_asked(tmp_path: Path) -> None:
    keys = [{"name": "k", "sha256": hash_of("secret"), "tenant": "t"}]
    async with keeping(tmp_path, watch=BATCH, keys=keys, roles={**ROLES, "core": {}}) as stack:
        headers = {"x-agent-role": "summarizer", "authorization": "Bearer secret"}
        for text in ("a plain question", f"I am {SECRET}"):
            async with stack.post(asked(text, user="bob", temperature=0), headers=headers) as response:
                assert response.status == 200
        await eventually(lambda: count(stack, "kept", "summarizer", "answer") == 1)
        await eventually(lambda: count(stack, "redacted", "summarizer", "answer") == 1)
        assert not any("prompt_logprobs" in body for body in stack.engines["bf16"].requests)
    store = opened(tmp_path)
    (number,) = store.ids("answer")
    kept = store.answer(number)
    store.close()
    assert kept is not None
    assert (kept.about.role, kept.about.variant) == ("summarizer", "assistant:int8")
    record = decode_answer(kept.data)
    assert record.cache_salt == ""
    assert json.loads(record.body) == {**asked("a plain question"), "temperature": 0}
    answer = Transcript.of(record.events)
    assert answer.texts == [Script().text]
    assert len(answer.tokens) == len(Script().text.split())
    assert read_object(record.events[0]) is not None


async def test_with_batch_a_variant_on_probation_is_judged_later(tmp_path: Path) -> None:
    watch = BATCH | {"probation_rate": 1.0, "probation_after_s": 0.01}
    async with keeping(tmp_path, watch=watch) as stack:
        order = {"action": "demote", "variant": "int4-kv8", "role": "intent_classifier", "why": "to see"}
        async with stack.http.post(stack.url + "/admin/watch", json=order) as response:
            assert response.status == 200
        watching = stack.gateway.watch
        assert watching is not None
        await eventually(lambda: watching.on_probation("intent_classifier"))
        await ask(stack, asked("hello"))
        await eventually(lambda: count(stack, "kept", kind="answer") == 2)
    store = opened(tmp_path)
    found = [store.answer(number) for number in store.ids("answer")]
    store.close()
    assert {(one.about.variant, one.about.probation) for one in found if one} == {
        ("assistant:int8", False),
        ("assistant:int4-kv8", True),
    }


async def test_a_gateway_that_is_told_to_end_writes_what_waits(tmp_path: Path, free_port: int) -> None:
    write_variants(tmp_path / "variants")
    engine = FakeEngine(Script())
    async with engine.serving(also=OTHERS) as url:
        pools = addresses(url)
        text = yaml.safe_load(settings(tmp_path / "variants", pools, run_dir=str(tmp_path), roles=ROLES))
        text |= {"kept": {}, "gateway": {"port": free_port}}
        (tmp_path / "tiercel.yaml").write_text(yaml.safe_dump(text))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "--config", str(tmp_path / "tiercel.yaml")),
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with aiohttp.ClientSession() as http:

                async def answered() -> bool:
                    with contextlib.suppress(aiohttp.ClientError):
                        body = asked("the last words", model="intent_classifier")
                        async with http.post(f"http://127.0.0.1:{free_port}{CHAT}", json=body) as response:
                            return response.status == 200
                    return False

                await eventually(answered, within_s=60)
                process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(60):
                _, said = await process.communicate()
            assert process.returncode == 0, said
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert b"the last words" not in said
    assert [one.messages[0]["content"] for one in questions(tmp_path)] == ["the last words"]
