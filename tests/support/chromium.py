"""A headless Chromium driven through its debugging pipe, where one is installed: no package, no port."""

import itertools
import json
import os
import shutil
import subprocess

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
EXECUTABLE = next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. `problems` and `requests` hold what its pages logged, threw and asked for."""

    def __init__(self, profile, width=1280, height=800):
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        # the protocol's file descriptors are 3 and 4
        script = 'exec "$@" 3<&$IN 4>&$OUT'
        arguments = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--remote-debugging-pipe", f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank",
        ]  # fmt: skip
        script = script.replace("$IN", str(commands)).replace("$OUT", str(answers))
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", script, "bash", EXECUTABLE, *arguments],
            pass_fds=(commands, answers),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._stream = os.fdopen(self._answers, "rb")
        self._ids, self._buffer, self._session = itertools.count(1), b"", None
        self.problems, self.requests, self._loaded = [], [], False
        [target] = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        message = {"id": next(self._ids), "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == message["id"]:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self):
        while b"\0" not in self._buffer:
            data = self._stream.read1(1 << 16)
            assert data, "the browser has ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.problems.append(message["params"])
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        self._loaded |= message.get("method") == "Page.loadEventFired"
        return message

    def open(self, path):
        self.problems, self.requests, self._loaded = [], [], False
        self.call("Page.navigate", url=path.as_uri())
        while not self._loaded:
            self._read()
        self.settle()

    def settle(self):
        """Lets what is due be drawn, and what glides come to rest."""
        self.run("new Promise(done => setTimeout(() => requestAnimationFrame(() => done(0)), 300))")

    def run(self, expression):
        """The value of a JavaScript expression, of its promise if it is one."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def mouse(self, kind, x, y, **more):
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, selector):
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = self.run(f"(() => {{ const b = {box}; return [b.left + b.width / 2, b.top + b.height / 2]; }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button="left", clickCount=1)
        self.settle()

    def press(self, key, text=None):
        codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Escape": 27, " ": 32}
        code = codes.get(key, ord(key[0].upper()))
        more = {"text": text or key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)
        self.settle()

    def screenshot(self):
        """PNG bytes as base64."""
        return self.call("Page.captureScreenshot")["data"]

    def close(self):
        self._process.terminate()
        self._process.wait(20)
        self._stream.close()
        os.close(self._commands)
