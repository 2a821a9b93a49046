"""Chromium without a window, driven over its DevTools pipe with nothing but the standard library."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """Path of an installed Chromium or Chrome."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Visit:
    """What opening a page showed.

    Args:
        requests: URLs asked for, without the page itself and data: URLs.
        complaints: script errors, console errors and warnings.
        values: results of the scripts, by name.
    """

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


def pipe() -> tuple[int, int]:
    """A pipe whose ends are neither 3 nor 4."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high  # type: ignore[return-value]


class Browser:
    """Context: a browser that cannot resolve any host name."""

    def __init__(self, executable: str, profile: Path) -> None:
        self.executable, self.profile = executable, profile
        self.number = 0
        self.buffer = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        read_theirs, self.write_ours = pipe()
        self.read_ours, write_theirs = pipe()
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={self.profile}",
            "--remote-debugging-pipe",
        ]
        # The DevTools pipe is file descriptors 3 (to the browser) and 4 (from it).
        become = f"import os, sys; os.dup2({read_theirs}, 3); os.dup2({write_theirs}, 4); "
        become += "os.execv(sys.argv[1], sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", become, self.executable, *options, "about:blank"],
            pass_fds=(read_theirs, write_theirs),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_theirs)
        os.close(write_theirs)
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.call("Browser.close")
            self.process.wait(20)
        except (RuntimeError, OSError, TimeoutError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.write_ours)
        os.close(self.read_ours)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One DevTools command and its result."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self.write_ours, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def receive(self, patience: float = 60.0) -> dict[str, Any]:
        deadline = time.monotonic() + patience
        while b"\0" not in self.buffer:
            if not select.select([self.read_ours], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise TimeoutError("the browser does not answer")
            chunk = os.read(self.read_ours, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser has ended")
            self.buffer += chunk
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def visit(
        self,
        page: Path,
        *,
        width: int,
        height: int = 900,
        dark: bool = False,
        scripts: dict[str, str] | None = None,
        screenshot: Path | None = None,
    ) -> Visit:
        """Open a local page in a window of ``width`` CSS pixels, run ``scripts`` in it, take a picture of all of it."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.events.clear()
        for domain in ("Network", "Page", "Runtime", "Log"):
            self.call(f"{domain}.enable", session)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", session, **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", session, features=[scheme])
        self.call("Page.navigate", session, url=page.absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())
        visit = Visit()
        for name, script in (scripts or {}).items():
            answer = self.call("Runtime.evaluate", session, expression=script, returnByValue=True, awaitPromise=True)
            visit.values[name] = answer.get("exceptionDetails", answer["result"].get("value"))
        if screenshot is not None:
            size = self.call("Page.getLayoutMetrics", session)["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": width, "height": min(size["height"], 16000), "scale": 1}
            picture = self.call("Page.captureScreenshot", session, clip=clip, captureBeyondViewport=True)
            screenshot.write_bytes(base64.b64decode(picture["data"]))
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith("data:") and url != page.absolute().as_uri():
                    visit.requests.append(url)
            elif method == "Runtime.exceptionThrown":
                visit.complaints.append(params["exceptionDetails"]["text"])
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                visit.complaints.append(str(params["args"]))
            elif method == "Log.entryAdded":
                visit.complaints.append(params["entry"]["text"])
        self.call("Target.closeTarget", targetId=target)
        return visit
