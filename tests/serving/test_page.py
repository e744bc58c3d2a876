"""The page in a real browser (Debian's Chromium): tokens appear in the order of their streams, errors are told."""

import asyncio
import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.serving.test_server import serving

CHROMIUM = shutil.which("chromium")


class Browser:
    """A page of Chromium, by its debugging protocol."""

    def __init__(self, profile: Path) -> None:
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,560"]
        words += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "--no-first-run", "about:blank"]
        self._process = subprocess.Popen([str(CHROMIUM), *words], stderr=subprocess.DEVNULL)
        self._port_file = profile / "DevToolsActivePort"
        self._number = 0

    async def __aenter__(self) -> "Browser":
        import aiohttp

        for _ in range(300):
            if self._port_file.is_file() and self._port_file.read_text().count("\n"):
                break
            await asyncio.sleep(0.1)
        port = self._port_file.read_text().splitlines()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            page = next(one for one in await answer.json() if one["type"] == "page")
        self._socket = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._socket.close()
        await self._session.close()
        self._process.terminate()
        self._process.wait(30)

    async def call(self, method: str, **values: object) -> dict:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": values})
        while True:
            message = json.loads((await self._socket.receive()).data)
            if message.get("id") == self._number:
                return message["result"]

    async def value(self, script: str) -> object:
        result = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def wait(self, script: str) -> object:
        for _ in range(600):
            found = await self.value(script)
            if found:
                return found
            await asyncio.sleep(0.05)
        raise AssertionError(f"never true: {script}; {await self.value('document.body.innerText')}")


def _ascii(text: object) -> str:
    return "".join(sign for sign in str(text) if sign.isascii())


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_shows_the_streams(tmp_path, model_dir):
    """What appears is what the server wrote; ``ARMD_SCREENSHOT`` keeps a picture of the half-written text."""

    async def visit(port: int) -> None:
        async with Browser(tmp_path / "profile") as browser:
            settings = "prompt=Return%20the%20&streams=4&tokens=48&temperature=0.7&seed=4&pace=60&draft=0"
            await browser.call("Page.navigate", url=f"http://127.0.0.1:{port}/?{settings}")
            await browser.wait("document.getElementById('model') && document.getElementById('model').textContent")
            await browser.value("document.getElementById('go').click()")
            half = "[...document.querySelectorAll('#text > :not(.given)')].map(b => b.classList.contains('token'))"
            await browser.wait(f"({half}).filter(Boolean).length >= 24")
            if os.environ.get("ARMD_SCREENSHOT"):
                picture = await browser.call("Page.captureScreenshot", format="png")
                Path(os.environ["ARMD_SCREENSHOT"]).write_bytes(base64.b64decode(picture["data"]))
            there = await browser.value(half)
            assert isinstance(there, list)
            parts = [there[start : start + 12] for start in range(0, 48, 12)]
            for part in parts:  # each stream is written from its head on
                assert part == sorted(part, reverse=True)
            counts = [sum(part) for part in parts]
            assert 0 < min(counts) <= max(counts) <= min(counts) + 1
            line = await browser.wait(
                "document.getElementById('state').textContent.includes('ended by') && "
                "document.getElementById('state').textContent"
            )
            assert str(line).startswith("48 tokens in 15 passes (3.20 tokens a pass)")
            shown = await browser.value(
                "[...document.querySelectorAll('#text .token:not(.behind)')].map(b => b.textContent).join('')"
            )
            body = json.dumps({"prompt": "Return the ", "max_tokens": 48, "streams": 4, "temperature": 0.7, "seed": 4})
            answer = await browser.call(
                "Runtime.evaluate",
                expression="fetch('/v1/completions', {method: 'POST', headers: {'Content-Type': 'application/json'}, "
                f"body: {body!r}}}).then(r => r.json()).then(r => r.choices[0].text)",
                awaitPromise=True,
                returnByValue=True,
            )
            # A character of several tokens is one only in the whole text.
            assert _ascii(shown) == _ascii(answer["result"]["value"])
            await browser.wait("document.getElementById('go').textContent == 'Generate'")  # else a click stops it
            await browser.value("document.getElementById('tokens').value = 9999; document.getElementById('go').click()")
            line = await browser.wait(
                "document.getElementById('state').className == 'error' && document.getElementById('state').textContent"
            )
            assert "takes up to" in str(line)

    with serving(model_dir) as server:
        asyncio.run(visit(server.port))
