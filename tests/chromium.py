"""Headless Chromium, driven over the DevTools protocol: what a person with a browser would see and do."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

FLAGS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--metrics-recording-only",
    "--hide-scrollbars",
)
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowDown": 40}


def find_chromium() -> str | None:
    """The browser's program, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if (found := shutil.which(name))), None)


class Chromium:
    """One browser process with a profile of its own. Pages of ``page()`` share nothing with each other."""

    def __init__(self, profile: Path) -> None:
        program = find_chromium()
        assert program is not None, "Chromium is not installed"
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        self._process = subprocess.Popen(
            [program, *FLAGS, *sandbox, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._address = self._wait(profile / "DevToolsActivePort")

    def _wait(self, file: Path) -> str:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if file.exists() and len(lines := file.read_text().splitlines()) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            assert self._process.poll() is None, "Chromium ended at once"
            time.sleep(0.05)
        self.close()
        raise AssertionError("Chromium did not start within 30 s")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @asynccontextmanager
    async def page(self, width: int = 1280, height: int = 900, dark: bool = False) -> AsyncIterator[Page]:
        """An empty page in a context of its own."""
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(self._address, max_msg_size=0) as socket,
        ):
            page = Page(socket)
            listening = asyncio.create_task(page.listen())
            try:
                await page.begin(width, height, dark)
                yield page
                await page.end()
            finally:
                listening.cancel()


class Page:
    """A page, and what has gone on in it."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session: str | None = None
        self._context = ""
        self.requests: list[str] = []
        """URLs that the page asked for."""
        self.problems: list[str] = []
        """Exceptions that nobody caught, and what the browser refused or warned of."""

    async def listen(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if (waiting := self._answers.pop(said.get("id", 0), None)) is not None:
                waiting.set_result(said)
            match said.get("method"):
                case "Network.requestWillBeSent":
                    self.requests.append(said["params"]["request"]["url"])
                case "Runtime.exceptionThrown":
                    self.problems.append(json.dumps(said["params"]["exceptionDetails"])[:1000])
                case "Log.entryAdded":
                    entry = said["params"]["entry"]
                    if entry["source"] != "network":  # a refused request is the gateway's business
                        self.problems.append(entry["text"])

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        session = {"sessionId": self._session} if self._session else {}
        await self._socket.send_json({"id": number, "method": method, "params": params, **session})
        async with asyncio.timeout(30):
            said = await answer
        assert "error" not in said, f"{method}: {said['error']}"
        return dict(said["result"])

    async def begin(self, width: int, height: int, dark: bool) -> None:
        self._context = (await self.send("Target.createBrowserContext"))["browserContextId"]
        target = await self.send("Target.createTarget", url="about:blank", browserContextId=self._context)
        attached = await self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.send(f"{domain}.enable")
        await self.resize(width, height)
        await self.colours(dark)

    async def end(self) -> None:
        self._session = None
        await self.send("Target.disposeBrowserContext", browserContextId=self._context)

    async def resize(self, width: int, height: int) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    async def colours(self, dark: bool) -> None:
        """What the person prefers; and nothing that moves, so that what is seen is what stays."""
        wanted = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wanted.items()]
        await self.send("Emulation.setEmulatedMedia", features=features)

    async def open(self, url: str) -> None:
        await self.send("Page.navigate", url=url)

    async def js(self, expression: str) -> Any:
        """The value of an expression; a promise's result."""
        found = await self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def until(self, expression: str, within_s: float = 20.0) -> Any:
        """Wait until an expression is true; gives its value. Fails with what the page shows."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if value := await self.js(
                f"(() => {{ try {{ return {expression} }} catch {{ return null }} }})()"
            ):
                return value
            await asyncio.sleep(0.05)
        text = await self.text()
        raise AssertionError(f"never true: {expression}; {self.problems}; the page shows:\n{text[:3000]}")

    async def text(self, selector: str = "body") -> str:
        return str(await self.js(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    async def says(self, text: str, selector: str = "body", within_s: float = 20.0) -> None:
        """Wait until a text can be read."""
        where = f"document.querySelector({json.dumps(selector)}).innerText"
        await self.until(f"{where}.includes({json.dumps(text)})", within_s)

    async def click(self, selector: str, text: str = "", within_s: float = 20.0) -> None:
        """Click the middle of the first visible element of a selector that has a text, with the mouse."""
        place = (
            f"[...document.querySelectorAll({json.dumps(selector)})]"
            f".filter(e => e.checkVisibility() && (e.ariaLabel || e.innerText).includes({json.dumps(text)}))"
            ".map(e => { e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            " return {x: b.x + b.width / 2, y: b.y + b.height / 2} })[0]"
        )
        at = await self.until(place, within_s)
        for kind in ("mousePressed", "mouseReleased"):
            await self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    async def press(self, key: str, shift: bool = False) -> None:
        """A key that does something."""
        text = {"Enter": "\r", " ": " "}.get(key)
        common = {"key": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 if shift else 0}
        more = {"text": text} if text else {}
        await self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **common, **more)
        await self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    async def type(self, text: str) -> None:
        """Into whatever has the focus."""
        await self.send("Input.insertText", text=text)

    async def screenshot(self, whole: bool = False) -> bytes:
        """A PNG; ``whole``: all of the page, not only what the window shows."""
        shot = await self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(shot["data"])
