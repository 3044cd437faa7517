"""Headless Chromium for tests of a page, by the DevTools protocol over a pipe (NUL-separated JSON on descriptors 3 and 4)."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    """Return the path of the browser; None if there is none."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Browser:
    """One tab. `events` has the messages of the browser since the tab was opened, the newest last."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._buffer, self._last = read, write, b"", 0
        self.events: list[dict[str, Any]] = []
        target = self._send("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session: str | None = None
        self._session = self._send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")

    def open(self, page: Path, width_px: int, scheme: str) -> None:
        """Load the file at a window width, in the light or dark scheme, and clear `events`."""
        phone = width_px < 600
        metrics = {"width": width_px, "height": 900, "deviceScaleFactor": 1, "mobile": phone}
        self._send("Emulation.setDeviceMetricsOverride", metrics)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self._send("Emulation.setEmulatedMedia", media)
        self.events = []
        self._send("Page.navigate", {"url": page.as_uri()})
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def value(self, script: str) -> Any:
        """Return the value of a JavaScript expression, from JSON."""
        answer = self._send("Runtime.evaluate", {"expression": script, "returnByValue": True})
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, path: Path, clip: dict[str, float] | None = None) -> None:
        """Return a PNG of the whole page, or of a part (x, y, width, height in px)."""
        options: dict[str, Any] = {"format": "png", "captureBeyondViewport": True}
        if clip:
            options["clip"] = {**clip, "scale": 1}
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot", options)["data"]))

    def problems(self) -> list[str]:
        """Return the console messages, exceptions and log entries since `open`."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """Return the addresses requested since `open`, without the page itself and data URLs."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [
            one["request"]["url"]
            for one in sent
            if one["type"] != "Document" and not one["request"]["url"].startswith("data:")
        ]

    def _send(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params or {}}
        if getattr(self, "_session", None):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError("the browser ended")
            self._buffer += part
        text, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(text))


@contextmanager
def browser(program: str, profile: Path) -> Iterator[Browser]:
    """Start Chromium without network. At the end of the block, end it and its children."""
    to_child, write = os.pipe()
    read, from_child = os.pipe()

    def descriptors() -> None:
        # The pipe itself may have the descriptors 3 and 4, so copy them to other numbers first.
        first, second = os.dup(to_child), os.dup(from_child)
        first, second = os.dup(first), os.dup(second)
        os.dup2(first, 3)
        os.dup2(second, 4)

    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
             "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe", f"--user-data-dir={profile}"]  # fmt: skip
    child = subprocess.Popen(
        [program, *flags],
        preexec_fn=descriptors,
        close_fds=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_child)
    os.close(from_child)
    try:
        yield Browser(read, write)
    finally:
        os.close(write)
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        os.close(read)
