"""A headless Chromium, driven over the DevTools protocol through a pair of pipes: the standard library is enough."""

import base64
import json
import os
import pathlib
import select
import shutil
import subprocess
import time

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe")
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Escape": 27}


def find() -> str | None:
    """Returns the path of a Chromium or Chrome, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Browser:
    """One page. `evaluate` returns the value of JavaScript, waiting for a promise; `wait` polls until it is true."""

    def __init__(self, folder: pathlib.Path, width: int = 1280, height: int = 800):
        read_theirs, self.write = os.pipe()
        self.read, write_theirs = os.pipe()
        for fd in (read_theirs, write_theirs):
            os.set_inheritable(fd, True)
        # the browser reads commands from 3 and writes answers to 4
        command = f'exec "$0" "$@" 3<&{read_theirs} 4>&{write_theirs}'
        self.process = subprocess.Popen(["bash", "-c", command, find(), *FLAGS, f"--user-data-dir={folder}", "about:blank"],
                                        pass_fds=(read_theirs, write_theirs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(read_theirs)
        os.close(write_theirs)
        self.buffer, self.number, self.session, self.console = b"", 0, None, []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.read)
        os.close(self.write)

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.console.append(json.dumps(answer["params"])[:500])

    def _receive(self, timeout: float = 60) -> dict:
        end = time.monotonic() + timeout
        while b"\0" not in self.buffer:
            if not select.select([self.read], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            chunk = os.read(self.read, 1 << 16)
            if not chunk:
                raise RuntimeError(f"the browser ended with {self.process.wait(5)}")
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def evaluate(self, script: str):
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", "the page threw"))
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not self.evaluate(f"(() => {{ try {{ return Boolean({script}) }} catch {{ return false }} }})()"):  # not there yet: false
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {script}; console: {self.console}; page: "
                                   f"{self.evaluate('document.body.innerText')[:500]}")
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Presses and lets go one key, as a keyboard does."""
        text = {} if len(key) > 1 else {"text": key}
        code = KEYS.get(key, ord(key[0].upper()))
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **(text if kind == "keyDown" else {}))

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def picture(self, path: pathlib.Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
