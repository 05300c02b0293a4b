"""A headless Chromium that lays out a page at a width, by the DevTools protocol."""

import asyncio
import itertools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NEEDS_CHROMIUM = pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
_COMMAND = ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--remote-debugging-port=0")


def evaluate(page: Path, profile: Path, script: str, *, width: int, scheme: str = "light") -> Any:
    """The JSON value of a script on a page that is `width` CSS pixels wide, with a preferred color scheme."""
    process = subprocess.Popen([*_COMMAND, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.PIPE,
                               text=True)
    try:
        assert process.stderr
        address = next(line.split()[-1] for line in process.stderr if line.startswith("DevTools listening"))
        return asyncio.run(asyncio.wait_for(_evaluate(address, page, script, width, scheme), 120))
    finally:
        process.kill()
        process.wait()


async def _evaluate(address: str, page: Path, script: str, width: int, scheme: str) -> Any:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{address.split('/')[2]}/json") as response:
            target = next(tab for tab in await response.json() if tab["type"] == "page")
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            numbers = itertools.count(1)

            async def call(method: str, **parameters: Any) -> Any:
                number = next(numbers)
                await socket.send_json({"id": number, "method": method, "params": parameters})
                while (answer := json.loads((await socket.receive()).data)).get("id") != number:
                    pass
                return answer["result"]

            await call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=True)
            await call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            await call("Page.navigate", url=page.as_uri())
            loaded = "new Promise(done => document.readyState == 'complete' ? done() : onload = done)"
            await call("Runtime.evaluate", expression=loaded, awaitPromise=True)
            result = await call("Runtime.evaluate", expression=f"JSON.stringify({script})", awaitPromise=True)
            return json.loads(result["result"]["value"])
