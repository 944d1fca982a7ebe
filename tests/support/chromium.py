"""Headless Chromium over the DevTools protocol: open a page, evaluate, press keys, click, take pictures."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import websocket

BOTH_LOADED = "[...document.querySelectorAll('video')].every((v) => v.readyState >= 3)"  # of the page's players
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--autoplay-policy=no-user-gesture-required", "--remote-debugging-port=0", "--remote-allow-origins=*"),
)
_KEYS = {" ": ("Space", 32), "Enter": ("Enter", 13), "Tab": ("Tab", 9), "Home": ("Home", 36), "End": ("End", 35)}
_KEYS |= {"ArrowLeft": ("ArrowLeft", 37), "ArrowUp": ("ArrowUp", 38), "ArrowRight": ("ArrowRight", 39)}
_KEYS |= {"ArrowDown": ("ArrowDown", 40), "PageDown": ("PageDown", 34), "Escape": ("Escape", 27)}


def find_chromium():
    """Path of the browser; tests that need one fail without it, they are never skipped."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise FileNotFoundError(f"the page's tests need one of {', '.join(NAMES)} on PATH: apt-get install chromium")
    return found


class Chromium:
    """One browser with one tab; a context manager.

    Attributes:
        requests: URLs the page asked for.
        errors: exceptions, console errors and warnings, and what the content security policy refused.
    """

    def __enter__(self):
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [find_chromium(), *_FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port, path = self._address()
        browser = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=30)
        self._socket, self._count, self._session = browser, 0, None
        self.requests, self.errors, self._loaded = [], [], False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *error):
        self._socket.close()
        self._process.terminate()
        self._process.wait(timeout=20)
        self._profile.cleanup()

    def _address(self):
        """Port and path that the browser wrote into its profile once it listens."""
        path, end = Path(self._profile.name, "DevToolsActivePort"), time.monotonic() + 60
        while time.monotonic() < end and self._process.poll() is None:
            if path.exists() and len(lines := path.read_text().split("\n")) > 1:
                return lines[:2]
            time.sleep(0.05)
        raise RuntimeError(f"Chromium did not start (exit code {self._process.poll()})")

    def send(self, method, **parameters):
        """Call a method of the protocol and return its result; events that come in between are noted."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer.get("method"), answer.get("params", {}))

    def _note(self, event, details):
        if event == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])
        elif event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(details["exceptionDetails"])[:800])
        elif event == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(details["args"])[:800])
        elif event == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.errors.append(details["entry"]["text"])

    def open(self, path, width=1440, height=1000, scale=1):
        """Open a file in a window of a size, in CSS pixels, and wait until it is loaded."""
        self.requests, self.errors, self._loaded = [], [], False
        self.resize(width, height, scale)
        self.send("Page.navigate", url=Path(path).resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def resize(self, width, height, scale=1):
        """Change the window; at most 720 pixels wide it is a phone."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale}
        self.send("Emulation.setDeviceMetricsOverride", **size, mobile=width <= 720)

    def evaluate(self, expression):
        """Value of a JavaScript expression; a promise is waited for."""
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self.send("Runtime.evaluate", expression=expression, **options)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:800])
        return answer["result"].get("value")

    def wait(self, expression, seconds=15):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.evaluate(expression):
                return
            time.sleep(0.03)
        raise TimeoutError(f"not true within {seconds} s: {expression}")

    def press(self, *keys):
        """Press keys one after the other, as a keyboard does."""
        for key in keys:
            code, number = _KEYS[key]
            text = {" ": " ", "Enter": "\r"}.get(key, "")
            about = {"key": key, "code": code, "windowsVirtualKeyCode": number}
            self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
            self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text):
        """Type into what has the focus."""
        self.send("Input.insertText", text=text)

    def point(self, selector):
        """Move the mouse to the middle of the first element that matches, scrolled into sight."""
        place = f"""(() => {{
            const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});
            const b = e.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2]; }})()"""
        x, y = self.evaluate(place)
        time.sleep(0.05)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def click(self, selector):
        """Click the middle of the first element that matches."""
        x, y = self.point(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, selector=None):
        """PNG of the window, or of the first element that matches, as bytes."""
        if selector is None:
            return base64.b64decode(self.send("Page.captureScreenshot")["data"])
        self.evaluate(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        x, y, width, height = self.evaluate(f"""(() => {{
            const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();
            return [b.left + scrollX, b.top + scrollY, b.width, b.height]; }})()""")
        clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        return base64.b64decode(self.send("Page.captureScreenshot", clip=clip)["data"])
