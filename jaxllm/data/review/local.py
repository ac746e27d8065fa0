"""A page for this machine's browser alone: its server, and the lock that keeps a second one off. Standard library only."""

import contextlib
import fcntl
import http.server
import json
import pathlib
import secrets
import signal
import traceback
import urllib.parse
from typing import Protocol

from jaxllm.errors import RunError, UserError, writing

MAX_BODY = 1 << 16


class App(Protocol):
    """What a page asks for and sends, as functions of plain values; nothing of HTTP in it."""

    page: pathlib.Path  # the HTML; NONCE in it becomes the word that its style and script need
    takes: tuple[str, ...]  # paths that are posted to

    def get(self, path: str, asked: dict[str, str]) -> dict | None:
        """Returns what a path shows, None where there is no such thing."""

    def post(self, path: str, sent: dict) -> dict:
        """Takes what was sent and returns the answer; raises UserError for what is wrong with it."""


def make_server(app: App, port: int) -> http.server.ThreadingHTTPServer:
    """Returns a server on 127.0.0.1, which answers once it is started; raises UserError where the port is taken."""
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    except OSError as e:
        raise UserError(f"port={port}: {e.strerror or e}; --port=0 takes any that is free") from None
    server.daemon_threads = True
    server.app = app
    return server


def serve(app: App, port: int, says: str) -> None:
    """Answers until Ctrl-C or SIGTERM; ADDRESS in what it says at the start becomes the page's."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts what it puts in the background with Ctrl-C ignored
        signal.signal(number, signal.default_int_handler)
    with make_server(app, port) as server:
        print(says.replace("ADDRESS", f"http://127.0.0.1:{server.server_address[1]}/"), flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


@contextlib.contextmanager
def alone(lock_path: pathlib.Path, says: str):
    """Holds a lock file for this process, as a second one would write over the first one's labels. A kill frees it."""
    with writing(lock_path):
        lock = lock_path.open("a+", encoding="utf-8")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(says) from None
        yield


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers this machine's browser alone: another site's page can neither read nor send."""

    def do_GET(self):
        if not self._is_ours():
            return
        url = urllib.parse.urlsplit(self.path)
        asked = {key: values[-1] for key, values in urllib.parse.parse_qs(url.query).items()}
        if url.path == "/":
            self._page()
            return
        self._answer(lambda: self.server.app.get(url.path, asked))

    def do_POST(self):
        if not self._is_ours():
            return
        length = self.headers.get("Content-Length", "")
        # a form of another site cannot send this type without asking first, and is not answered then
        if self.path not in self.server.app.takes or self.headers.get_content_type() != "application/json":
            self._json({"error": "no such page"}, 404)
        elif not length.isdigit() or int(length) > MAX_BODY:
            self._json({"error": f"should be at most {MAX_BODY} bytes"}, 413)
        else:
            body = self.rfile.read(int(length))
            self._answer(lambda: self.server.app.post(self.path, _object(body)))

    def _answer(self, of) -> None:
        try:
            found = of()
        except (UserError, ValueError) as e:
            self._json({"error": str(e)}, 400)
        except RunError as e:  # the disk is full: the page says so and keeps what was typed
            self._json({"error": str(e)}, 507)
        except Exception:  # a bug of ours: the terminal has the lines to report, and the page does not take it for our end
            traceback.print_exc()
            self._json({"error": "jaxllm failed here; the terminal says more"}, 500)
        else:
            self._json({"error": "no such page"} if found is None else found, 404 if found is None else 200)

    def _is_ours(self) -> bool:
        """Answers 403 to a request that names another host or comes from another site's page (DNS rebinding)."""
        port = self.server.server_address[1]
        hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in hosts and (origin is None or origin.removeprefix("http://") in hosts):
            return True
        self._json({"error": "this page is for this machine only"}, 403)
        return False

    def _page(self) -> None:
        nonce = secrets.token_urlsafe(12)
        body = self.server.app.page.read_text(encoding="utf-8").replace("NONCE", nonce).encode()
        policy = (f"default-src 'none'; connect-src 'self'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
                  "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
        self._send(body, "text/html; charset=utf-8", 200, policy)

    def _json(self, value: dict, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), "application/json", status, "default-src 'none'")

    def _send(self, body: bytes, kind: str, status: int, policy: str) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), ("Content-Security-Policy", policy),
                            ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):  # one line a click is of no use
        pass


def _object(body: bytes) -> dict:
    sent = json.loads(body)
    return sent if isinstance(sent, dict) else {}


def read_guidelines(path: str | None, default: str) -> str:
    """Returns the text of a file of guidelines, or the default where none is named."""
    if path is None:
        return default
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"guidelines={path}: cannot be read: {getattr(e, 'strerror', None) or 'is not UTF-8'}") from None
