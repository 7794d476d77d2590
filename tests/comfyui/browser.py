"""A headless Chromium and one page in it, driven over the DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from helpers import eventually
from websockets.sync.client import ClientConnection, connect

__all__ = ["CHROMIUM", "Browser"]

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
"""The browser's program; None if there is none."""
START_S = 60.0
ANSWER_S = 60.0


class Browser:
    """Chromium with a profile of its own and one page."""

    def __init__(self, width: int = 1280, height: int = 900) -> None:
        self._size = width, height
        self._profile = Path(tempfile.mkdtemp(prefix="chromium-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._page: ClientConnection | None = None
        self._stack = ExitStack()
        self._ids = 0
        self.events: list[dict[str, Any]] = []
        """What the page has told so far without being asked: errors, messages of its console, requests."""

    def __enter__(self) -> Browser:
        assert CHROMIUM is not None
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--no-first-run", "--disable-extensions", "--remote-debugging-port=0"]
        command += [f"--user-data-dir={self._profile}", f"--window-size={self._size[0]},{self._size[1]}", "about:blank"]
        with (self._profile / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            port = eventually(self._port, START_S, "Chromium listens")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=ANSWER_S) as reply:
                page = next(each for each in json.load(reply) if each["type"] == "page")
            self._page = self._stack.enter_context(connect(page["webSocketDebuggerUrl"], max_size=None))
            for domain in ("Page", "Runtime", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        self._stack.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    def _port(self) -> int | None:
        assert self._process is not None
        assert self._process.poll() is None, (self._profile / "log").read_text(errors="replace")
        path = self._profile / "DevToolsActivePort"
        lines = path.read_text().splitlines() if path.exists() else []
        return int(lines[0]) if len(lines) == 2 else None

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and what it answers."""
        assert self._page is not None
        self._ids += 1
        self._page.send(json.dumps({"id": self._ids, "method": method, "params": params}))
        while True:
            message = json.loads(self._page.recv(timeout=ANSWER_S))
            if message.get("id") == self._ids:
                assert "error" not in message, message["error"]
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def run(self, code: str) -> Any:
        """What a JavaScript expression comes to in the page; promises are waited for."""
        told = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, code: str, what: str, timeout_s: float = 60.0) -> Any:
        """Poll until a JavaScript expression is true, and return what it came to."""
        return eventually(lambda: self.run(code), timeout_s, what, every_s=0.1)

    def open(self, url: str) -> None:
        """Go to a page."""
        self.call("Page.navigate", url=url)

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            named = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            self.call(
                "Input.dispatchKeyEvent", type=kind, **named, **({"text": text} if kind == "keyDown" and text else {})
            )

    def screenshot(self, path: Path) -> None:
        """The page as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
