"""The console in a real browser, over a running gateway: what a person sees, and what their clicks do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fleet import MODELS, ROLES, cards_of
from gateway_stack import Stack, running_gateway, write_variants

from gateway.identity import hash_of
from gateway.quality.cells import EventKind, WatchEvent
from tests.chromium import Chromium, Page, find_chromium

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="needs Chromium: install the package chromium"
)

KEYS = (
    {"name": "boss", "sha256": hash_of("boss-key"), "admin": True},
    {"name": "agent", "sha256": hash_of("agent-key")},
)
VIEWS = ("live", "precision", "variants", "quality", "replicas", "usage", "playground")
EVIL = "<img src=x onerror=\"document.title='owned'\">"
CONTRAST = """(() => {
  const parse = (c) => (c.match(/[\\d.]+/g) ?? [0, 0, 0]).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest(".hidden, .skip, [hidden], option")) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(parse(e instanceof SVGElement ? style.fill : style.color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push(`${e.outerHTML.slice(0, 80)}: ${ratio.toFixed(2)}`);
  }
  return bad;
})()"""
NAMED = {
    "button",
    "link",
    "textbox",
    "searchbox",
    "combobox",
    "checkbox",
    "spinbutton",
    "dialog",
    "image",
    "table",
}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@asynccontextmanager
async def console(chromium: Chromium, url: str, view: str = "", **options: Any) -> AsyncIterator[Page]:
    """The page of a gateway. Nothing may go wrong in it, and nothing be asked of anybody else."""
    async with chromium.page(**options) as page:
        await page.open(f"{url}/console" + (f"#{view}" if view else ""))
        yield page
        assert page.problems == []
        assert {request.split("/")[2] for request in page.requests} == {url.split("/")[2]}


async def ask(stack: Stack, role: str, times: int = 1) -> str:
    variant = ""
    for _ in range(times):
        async with stack.post({"stream": True}, headers={"x-agent-role": role}) as response:
            await response.read()
            variant = response.headers.get("x-tiercel-variant", "none")
    return variant


async def test_live_traffic(chromium: Chromium, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.api.overview.INTERVAL_S", 1)
    async with running_gateway() as stack, console(chromium, stack.url) as page:
        await page.says("No traffic yet")
        await page.says(f"curl {stack.url}/v1/chat/completions", "pre")
        await page.says("Every pool can be reached")
        assert await ask(stack, "intent_classifier", 3) == "assistant:int4-kv8"
        stack.engines["bf16"].script.status = 500
        await ask(stack, "core")
        await page.until("document.querySelectorAll('.stacks tbody tr').length === 2")
        rows = await page.text(".stacks tbody")
        assert "intent_classifier\tassistant:int4-kv8" in rows
        assert "core\tassistant:bf16" in rows
        assert "100 %" in rows, "of core's requests failed"
        assert "No traffic yet" not in await page.text()
        await page.until(
            "/requests: now [\\d.]+, lowest/.test(document.querySelector('.chart svg').ariaLabel)"
        )
        await page.until("document.querySelectorAll('.chart svg .line.c0').length > 0")
        await page.says("of the last minute's requests failed", ".attention")
        await page.click(".chart summary")
        await page.until("document.querySelectorAll('.chart tbody tr').length > 0")
        await page.click("button", "core")
        await page.says("core on assistant:bf16", ".which")


async def test_signing_in(chromium: Chromium) -> None:
    async with running_gateway(keys=KEYS) as stack, console(chromium, stack.url) as page:

        async def give(key: str) -> None:
            await page.until("document.activeElement.type === 'password'")
            await page.type(key)
            await page.press("Enter")

        await page.says("This gateway has keys.")
        await give("wrong-key")
        await page.says("this key is not known", ".error")
        await give("agent-key")
        await page.says("this key is no admin's", ".error")
        assert await page.js("sessionStorage.length") == 0, "a key that does not do is forgotten"
        await give("boss-key")
        await page.says("No traffic yet")
        assert await page.js("localStorage.length + document.cookie.length") == 0
        await page.send("Page.reload")
        await page.says("No traffic yet")
        await page.click("button", "Sign out")
        await page.says("This gateway has keys.")
        assert await page.js("sessionStorage.length") == 0
        assert not any("boss-key" in request for request in page.requests)


async def test_demoting_by_click(chromium: Chromium) -> None:
    async with running_gateway() as stack, console(chromium, stack.url, "precision") as page:
        assert await ask(stack, "intent_classifier") == "assistant:int4-kv8"
        await page.click("button.cell", "intent_classifier on assistant:int4-kv8: serves")
        await page.says("passed", "dialog")
        await page.click("dialog button", "Demote")
        await page.says("Demote assistant:int4-kv8 for intent_classifier?", "dialog")
        await page.click("dialog button", "Demote")
        assert await page.js("document.querySelector('dialog input').matches(':invalid')"), (
            "a reason is needed"
        )
        assert await ask(stack, "intent_classifier") == "assistant:int4-kv8", "nothing has been done yet"
        await page.click("dialog input")
        await page.type("it makes totals up")
        await page.click("dialog button", "Demote")
        await page.says("assistant:int4-kv8 is demoted for intent_classifier.")
        await page.says("assistant:int4-kv8 is out of service: it makes totals up.", ".map")
        assert await ask(stack, "intent_classifier") == "assistant:int8"
        await page.click("nav a", "Quality")
        await page.says("it makes totals up")
        await page.click("nav a", "Live")
        await page.click(".attention a", "out of service for intent_classifier")
        await page.until("location.hash === '#quality'")


async def test_events_of_one_moment_are_all_there(chromium: Chromium) -> None:
    async with running_gateway() as stack:
        watch = stack.gateway.watch
        assert watch is not None
        key = watch.key("assistant:int4-kv8", "intent_classifier")
        assert key is not None
        store, events = watch._open, [WatchEvent(EventKind.ALARM, key, 1.7e9, why) for why in ("one", "two")]
        await watch._in_thread(lambda: store().change([], events))
        async with console(chromium, stack.url, "quality") as page:
            await page.until("document.querySelectorAll('.verdict.warn').length === 2")


async def test_the_keyboard_is_enough(chromium: Chromium) -> None:
    async with running_gateway() as stack, console(chromium, stack.url) as page:
        await page.says("No traffic yet")

        async def tab_to(words: str) -> None:
            for _ in range(40):
                await page.press("Tab")
                here = "(document.activeElement.ariaLabel || document.activeElement.innerText || '').trim()"
                if words in await page.js(here):
                    ring = await page.js("getComputedStyle(document.activeElement).outlineStyle")
                    assert ring != "none", f"the focus on {words} cannot be seen"
                    return
            raise AssertionError(f"Tab never comes to {words!r}")

        await tab_to("Precision")
        await page.press("Enter")
        await page.until("document.activeElement.id === 'title'")
        await tab_to("summarizer on assistant:int8: serves")
        await page.press("Enter")
        await tab_to("Pin: demoted")
        await page.press("Enter")
        await page.until("document.activeElement.name === 'why'")
        await page.type("on holiday")
        await page.press("Enter")
        await page.says("assistant:int8 is pinned: demoted for summarizer.")
        await page.until("document.activeElement.matches('button.cell')")
        assert await ask(stack, "summarizer") == "assistant:bf16"
        await page.says("on holiday", ".map")
        await page.press("Enter")  # the cell has changed, and is still the one
        await page.until("document.querySelector('dialog').open")
        await page.press("Escape")
        await page.until("!document.querySelector('dialog')")


async def test_a_canary_lasts_until_the_next_start(chromium: Chromium, tmp_path: Path) -> None:
    write_variants(tmp_path)
    stacks = running_gateway(variants_dir=tmp_path, keys=KEYS)
    async with stacks as stack, console(chromium, stack.url, "precision") as page:
        await page.until("document.activeElement.type === 'password'")
        await page.type("boss-key")
        await page.press("Enter")
        await page.click("button", "Canary of core: none")
        await page.says("the configuration file is left alone", "dialog")
        await page.js("document.querySelector('dialog select').value = 'assistant:int8'")
        await page.js("document.querySelector('dialog input').value = '100'")
        await page.click("dialog button", "Apply")
        await page.says("100 % assistant:int8", ".map")
        key = {"authorization": "Bearer agent-key"}
        async with stack.post(headers=key) as response:
            assert response.headers["x-tiercel-route-reason"] == "canary"
        (tmp_path / "assistant" / "int8" / "current").unlink()
        await page.click("button", "Canary of core: 100 %")
        await page.click("dialog button", "Apply")
        await page.says("does not exist; make the variant", "dialog .error")


async def test_the_playground_shows_what_differs(chromium: Chromium) -> None:
    async with running_gateway() as stack, console(chromium, stack.url, "playground") as page:
        stack.engines["bf16"].script.text = f"The total is $277 {EVIL} today."
        stack.engines["int4-kv8"].script.text = f"The total is $271 {EVIL} today."
        await page.click("textarea[name=prompt]")
        await page.type(f"{EVIL} how much?")
        await page.click("button", "Ask both")
        await page.says("They part at number 4.", ".summary")
        marks = "[...document.querySelectorAll('mark')].map(e => e.textContent.trim())"
        assert await page.js(marks) == ["$277", "$271"]
        sides = await page.text(".pair")
        assert "assistant:bf16 (explicit variant)" in sides
        assert "assistant:int4-kv8 (explicit variant)" in sides
        assert EVIL in sides
        first = (
            "[...document.querySelectorAll('.facts')].every(e => / ms|\\d s/.test(e.children[0].innerText))"
        )
        assert await page.js(first), "time to the first token"
        assert await page.js("document.images.length") == 0
        assert stack.asked("bf16")[-1]["messages"][-1]["content"] == f"{EVIL} how much?"
        await page.click(".side summary")
        await page.says("90 %", ".side tbody")
        await page.click("label", "Streamed")
        stack.engines["bf16"].script.status = 400
        stack.engines["bf16"].script.message = "this is too long"
        await page.click("button", "Ask both")
        await page.says("this is too long", ".side .error")
        await page.says("nothing to compare", ".summary")


async def test_an_engine_that_is_down(chromium: Chromium) -> None:
    async with running_gateway() as stack, console(chromium, stack.url, "precision") as page:
        await page.until("document.querySelectorAll('.cell').length === 9")
        stack.engines["int4-kv8"].script.healthy = False
        await page.says("assistant:int4-kv8 is down; the next more precise one takes over.", ".map")
        await page.click("nav a", "Replicas")
        await page.says("cannot be reached", ".stacks")
        await page.click("nav a", "Live")
        await page.says("No replica of assistant:int4-kv8 can be reached.", ".attention")


async def test_a_gateway_that_is_gone(chromium: Chromium) -> None:
    async with chromium.page() as page:
        async with running_gateway() as stack:
            await page.open(stack.url + "/console")
            await page.says("No traffic yet")
        await page.says("The gateway cannot be reached.", "#banner")
        await page.says("old. Next try in", "#banner")
        await page.says("No traffic yet", "main")
        assert await page.js("document.getElementById('banner-text').role || 'alert'") == "alert"
        await page.click("button", "Try now")


async def test_two_hundred_roles_one_of_them_evil(chromium: Chromium) -> None:
    long = "a_very_long_role_name_" * 8
    roles: dict[str, Any] = {f"role_{number}": {} for number in range(198)} | {EVIL: {}, long: {}}
    async with running_gateway(roles=roles, default_role=EVIL) as stack:
        await ask(stack, "role_7")
        async with console(chromium, stack.url, "precision", width=360, height=740) as page:
            await page.until("document.querySelectorAll('.map tbody tr').length === 200", within_s=20)
            drawing = (
                "(() => { const t = performance.now(); location.hash = ''; location.hash = 'precision';"
                " document.querySelector('.map').offsetHeight; return performance.now() - t })()"
            )
            assert await page.js(drawing) < 5000
            await page.click("input[type=search]")
            await page.type("img src")
            await page.until("document.querySelectorAll('.map tbody tr').length === 1")
            assert EVIL in await page.text(".map")
            await page.click("button.cell", "on assistant:int8")
            assert EVIL in await page.text("dialog")
            await page.press("Escape")
            for view in VIEWS:
                await page.js(f"location.hash = '{view}'")
                await page.until(f"document.querySelector('nav [aria-current]').hash === '#{view}'")
                await asyncio.sleep(0.1)
                assert await page.js("document.documentElement.scrollWidth") <= 360, view
            assert await page.js("document.images.length") == 0
            assert "owned" not in await page.js("document.title")


async def test_everybody_can_read_it(chromium: Chromium) -> None:
    async with running_gateway() as stack, console(chromium, stack.url) as page:
        await ask(stack, "core", 2)
        order = {"action": "demote", "variant": "int8", "role": "summarizer"}
        async with stack.http.post(stack.url + "/admin/watch", json=order) as response:
            assert response.status == 200
        await page.says("out of service for summarizer", ".attention")
        papers, shots = set(), set()
        for view in VIEWS:
            await page.js(f"location.hash = '{view}'")
            await page.until(f"document.querySelector('nav [aria-current]').hash === '#{view}'")
            for dark in (False, True):
                await page.colours(dark)
                papers.add(await page.js("getComputedStyle(document.body).backgroundColor"))
                assert await page.js(CONTRAST) == [], f"{view}, {dark=}"
                shots.add(await page.screenshot())
            tree = await page.send("Accessibility.getFullAXTree")
            nodes = [node for node in tree["nodes"] if not node["ignored"] and node["role"]["value"] in NAMED]
            assert len(nodes) > 8
            assert [node for node in nodes if not node.get("name", {}).get("value")] == [], view
            assert await page.js("document.querySelectorAll('h1').length") == 1
        assert len(papers) == 2, "light and dark"
        assert len(shots) == 2 * len(VIEWS)


async def test_a_fleet_of_several_models(chromium: Chromium) -> None:
    """Variants have their whole names, and what a model may not serve has no cell."""
    fleet: dict[str, Any] = {"models": MODELS, "roles": ROLES, "cards": cards_of()}
    async with running_gateway(**fleet) as stack, console(chromium, stack.url, "precision") as page:
        await page.says("big, small", ".bar")
        row = "document.querySelectorAll('.map tbody tr')[{}].innerText".format
        assert "small:int4" in await page.js(row(1))
        assert (await page.js(row(0))).count("–") == 2, "two variants of the model that it is not for"
        await page.click("button.cell", "writer on small:int4: serves")
        await page.says("against big: accuracy drop", "dialog")
        await page.click("dialog button", "Close")
        await page.click("button.quiet", "Canary of core")
        choice = "[...document.querySelectorAll('dialog option')].map((one) => one.value).join()"
        assert await page.js(choice) == "big:bf16,big:int8"
        await page.click("dialog button", "Cancel")
        await page.click("nav a", "Variants")
        await page.says("as many right as big")
        await page.click("nav a", "Playground")
        await page.click("textarea[name=prompt]")
        await page.type("how much?")
        await page.click("button", "Ask both")
        await page.says("Both say the same", ".summary")
        assert stack.asked("big:bf16")
