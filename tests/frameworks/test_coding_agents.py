"""Claude Code and Codex: the programs themselves, as their pages say, and the requests that they document."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import pytest

from gateway.upstream.fake import Call, Script
from tests.frameworks.environments import PAGES, frameworks
from tests.frameworks.harness import Scripted, eventually
from tests.frameworks.recipe import SHOWN_URL
from tests.frameworks.scripted import hello, read, script_for

pytestmark = pytest.mark.asyncio(loop_scope="module")

RAN_S = 120
TOOL = {"name": "Read", "input_schema": {"type": "object", "properties": {"file_path": {"type": "string"}}}}
SHELL = {
    "type": "function",
    "name": "exec_command",
    "strict": False,
    "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]},
}


def block(page: str, language: str) -> str:
    text = (PAGES / page).read_text(encoding="utf-8")
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return str(found)


async def run(page: str, question: str, url: str, home: Path) -> str:
    """What the program says, run by the shell lines of its page in an empty home."""
    programs = frameworks()["coding-agents"].programs
    if programs is None:
        pytest.skip("Claude Code and Codex are not installed here; `make frameworks` installs them")
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-euc",
        block(page, "sh").replace(SHOWN_URL, url),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=home,
        env={"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(home), "QUESTION": question},
    )
    try:
        async with asyncio.timeout(RAN_S):
            said, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, said.decode() + errors.decode()
    return said.decode()


def scripts(scripted: Scripted, calls: Callable[[dict[str, Any]], Call | None]) -> None:
    """Engines that make the call that a question wants, once."""

    def answer(variant: str, body: dict[str, Any]) -> Script:
        asked = read(body)
        call = None if asked.results else calls(body)
        return Script(calls=(call,)) if call else script_for(variant, body)

    for name, engine in scripted.stack.engines.items():
        variant = name.partition(":")[2]
        engine.scripts = lambda body, variant=variant: answer(variant, body)  # type: ignore[misc]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "note.txt").write_text("forty two", encoding="utf-8")
    return tmp_path


async def test_claude_code_reads_a_file_with_its_tool(scripted: Scripted, home: Path) -> None:
    scripts(
        scripted,
        lambda body: (
            Call("Read", json.dumps({"file_path": str(home / "note.txt")}))
            if "read the note" in read(body).question
            else None
        ),
    )
    scripted.begin()
    answer = json.loads(await run("claude-code.md", "read the note", scripted.url, home))
    assert "forty two" in answer["result"]
    assert answer["is_error"] is False
    told = [record for record in scripted.told() if record.path == "/v1/messages"]
    assert [record.status for record in told] == [200, 200]
    assert {record.session for record in told} == {answer["session_id"]}
    assert answer["usage"]["output_tokens"] == sum(record.usage.completion for record in told)


async def test_claude_code_starts_a_sub_agent(scripted: Scripted, home: Path) -> None:
    given = {"description": "greet", "prompt": "Say hello.", "subagent_type": "general-purpose"}
    scripts(
        scripted,
        lambda body: Call("Agent", json.dumps(given)) if "ask somebody else" in read(body).question else None,
    )
    scripted.begin()
    answer = json.loads(await run("claude-code.md", "ask somebody else", scripted.url, home))
    assert hello("bf16") in answer["result"], "what the sub-agent was told"
    told = [record for record in scripted.told() if record.path == "/v1/messages"]
    assert [record.status for record in told] == [200, 200, 200]
    session = answer["session_id"]
    (sub,) = [record for record in told if record.session != session]
    assert sub.parent == session, "a sub-agent has a session of its own, and knows whose it is"


async def test_codex_runs_a_command_with_its_tool(scripted: Scripted, home: Path) -> None:
    directory = home / ".codex"
    directory.mkdir()
    settings = block("codex.md", "toml").replace(SHOWN_URL, scripted.url)
    (directory / "config.toml").write_text(settings, encoding="utf-8")
    scripts(scripted, lambda _: Call("exec_command", json.dumps({"cmd": "cat note.txt"})))
    scripted.begin()
    lines = (await run("codex.md", "read the note", scripted.url, home)).splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    said = [event["item"]["text"] for event in events if event.get("item", {}).get("type") == "agent_message"]
    assert "forty two" in said[-1]
    thread = events[0]["thread_id"]
    assert {(record.path, record.status) for record in scripted.told()} == {("/v1/responses", 200)}
    assert {record.session for record in scripted.told()} == {thread}
    (used,) = [event["usage"] for event in events if event["type"] == "turn.completed"]
    assert used["output_tokens"] == sum(record.usage.completion for record in scripted.told())


async def test_the_requests_that_claude_code_documents(scripted: Scripted) -> None:
    """Beta flags, thinking, cache marks, tools, a stream that is broken off, and counting."""
    scripts(scripted, lambda body: Call("Read", '{"file_path": "a"}') if "use it" in str(body) else None)
    headers = {
        "anthropic-beta": "claude-code-20250219,context-management-2025-06-27",
        "x-claude-code-session-id": "3a6f",
        "x-app": "cli",
    }
    asked: dict[str, Any] = {
        "model": "assistant",
        "max_tokens": 32000,
        "system": [{"type": "text", "text": "You help.", "cache_control": {"type": "ephemeral"}}],
        "tools": [TOOL],
        "metadata": {"user_id": '{"session_id": "3a6f"}'},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    }
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "use it"}]}]
    scripted.begin()
    async with anthropic.AsyncAnthropic(
        base_url=scripted.url, api_key="any", default_headers=headers, max_retries=0
    ) as client:
        async with client.beta.messages.stream(**asked, messages=messages) as stream:
            kinds = [event.type async for event in stream]
            answer = await stream.get_final_message()
        assert "input_json" in kinds
        (used,) = answer.content
        assert (used.type, used.input) == ("tool_use", {"file_path": "a"})  # type: ignore[union-attr]
        assert answer.stop_reason == "tool_use"
        counted = await client.messages.count_tokens(model="assistant", messages=messages)
        assert counted.input_tokens > 0
        slow = [{"role": "user", "content": "Count to a thousand."}]
        async with client.messages.stream(model="assistant", max_tokens=9, messages=slow) as stream:
            async for _ in stream.text_stream:
                break
        await eventually(lambda: scripted.aborted() == 1)
    await eventually(lambda: len(scripted.told()) == 3)
    assert {record.session for record in scripted.told()} == {"3a6f"}
    first = scripted.bodies()["bf16"][0]
    assert {name: first[name] for name in asked} == asked, "all of it reaches the engine as it was sent"


async def test_the_requests_that_codex_documents(scripted: Scripted) -> None:
    """Function tools, nothing stored, items sent again; then a turn that goes on from one that was kept."""
    scripts(scripted, lambda body: Call("exec_command", '{"cmd": "ls"}') if body.get("tools") else None)
    headers = {"session-id": "01a2", "originator": "codex_exec", "x-openai-subagent": "review"}
    common: dict[str, Any] = {
        "model": "assistant",
        "instructions": "You are a coding agent.",
        "tools": [SHELL],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a2",
    }
    question = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "look"}]}
    scripted.begin()
    async with aiohttp.ClientSession(scripted.url, headers=headers) as http:

        async def respond(**body: Any) -> dict[str, Any]:
            async with http.post("/v1/responses", json=body) as response:
                assert response.status == 200
                lines = (await response.text()).splitlines()
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            numbers = [event["sequence_number"] for event in events]
            assert numbers == sorted(numbers)
            last: dict[str, Any] = events[-1]
            assert last["type"] == "response.completed"
            return dict(last["response"])

        (call,) = (await respond(**common, input=[question]))["output"]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "a.txt"}
        second = await respond(**common, input=[question, call, result])
        assert second["output"][0]["content"][0]["text"] == "It is so: a.txt"
        kept = await respond(model="assistant", input=[question], stream=True, store=True)
        third = await respond(
            model="assistant", input=[question], stream=True, store=True, previous_response_id=kept["id"]
        )
        assert third["previous_response_id"] == kept["id"]
    assert "01a2" in {record.session for record in scripted.told()}
    assert [len(body["input"]) for body in scripted.bodies()["bf16"]] == [1, 3, 1, 3]
