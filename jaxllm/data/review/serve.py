"""The page's server: this machine only, standard library only, every label on disk before it is answered."""

import http.server
import json
import pathlib
import secrets
import urllib.parse

from jaxllm.data.review import labels as labels_file
from jaxllm.data.review.config import ReviewVerb
from jaxllm.data.review.labels import Label, Labels
from jaxllm.data.review.results import results
from jaxllm.data.review.sample import Sample
from jaxllm.errors import RunError, UserError

PAGE = pathlib.Path(__file__).with_name("page.html")
MAX_BODY = 1 << 16

GUIDELINES = """Would you want a language model to learn from this text?

Keep: connected, readable text that says something, in whatever field, style or language. Mistakes of spelling, slang and \
opinions are no reason to drop it. Code, tables and dialogues are text too.

Drop: menus, cookie notices and lists of links; text broken by the extraction; keyword spam and advertising; text that a \
template or a machine turned out and that says nothing; hate, threats and sexual content about real people; private details of \
people who are not public.

Part good, part bad: keep it if you would keep it as it stands, with the bad part in it.

Copies: where two texts stand side by side, drop means that nothing is lost without the first one.

Unsure: if you cannot tell after a minute. Say why in the note; it helps to mend these guidelines.

Judge alone: agreement is measured, so please do not talk about single documents before both of you have labelled them."""


class Review:
    """What the page asks for and sends, as functions of plain values; nothing of HTTP in it."""

    def __init__(self, sample: Sample, labels: Labels, cfg: ReviewVerb):
        self.sample, self.labels, self.cfg = sample, labels, cfg
        self.guidelines = read_guidelines(cfg.guidelines)
        self.place = {item.id: n for n, item in enumerate(sample.items)}

    def state(self, expert: str) -> dict:
        mine = {doc: label.label for (doc, who), label in list(self.labels.by.items()) if who == expert}
        return {"title": pathlib.Path(self.cfg.run).resolve().name, "guidelines": self.guidelines,
                "reasons": list(self.cfg.reasons), "experts": self.labels.experts(), "documents": len(self.sample.items),
                "labels": [mine.get(item.id) for item in self.sample.items], "next": self.next_for(expert, -1)}

    def item(self, n: int, expert: str) -> dict:
        item = self.sample.items[n]
        label = self.labels.by.get((item.id, expert), Label(""))
        shown = {"n": n, "id": item.id, "source": item.source, "text": item.text, "copy_of": item.duplicate_of,
                 "other": item.other, "label": label.label, "reasons": label.reasons, "note": label.note}
        if self.cfg.show_decision:
            shown |= {"decision": item.decision, "value": item.value}
        return shown

    def next_for(self, expert: str, after: int) -> int | None:
        """Returns the next document this expert has not labelled and that others have not labelled often enough."""
        by_document = self.labels.by_document()
        n = len(self.sample.items)
        settles = expert == self.cfg.adjudicator
        for i in [*range(after + 1, n), *range(after + 1)]:
            found = by_document.get(self.sample.items[i].id, {})
            others = [label for who, label in found.items() if who != self.cfg.adjudicator]
            wanted = len(set(others)) > 1 if settles else len(others) < self.cfg.labels_each
            if expert not in found and wanted:
                return i
        return None

    def put(self, sent: dict) -> dict:
        """Saves a label; returns where the expert goes on. Raises UserError for what is no label."""
        expert, doc = str(sent.get("expert", "")), sent.get("id")
        if doc not in self.place:
            raise UserError(f"document {doc!r} is not in the sample")
        reasons = [r for r in self.cfg.reasons if r in (sent.get("reasons") or [])]
        row = {"label": str(sent.get("label", "")), "expert": expert, "note": str(sent.get("note") or "")}
        label = labels_file.checked(row, "label")
        self.labels.put({(doc, expert): Label(label.label, tuple(reasons), label.note, labels_file.now())})
        return {"next": self.next_for(expert, self.place[doc]), "saved": label.label}

    def results(self) -> dict:
        found = results(self.sample, self.labels, self.cfg)
        return found | {"disagreements": [row | {"n": self.place[row["id"]]} for row in found["disagreements"]]}


def read_guidelines(path: str | None) -> str:
    if path is None:
        return GUIDELINES
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"guidelines={path}: cannot be read: {getattr(e, 'strerror', None) or 'is not UTF-8'}") from None


def make_server(review: Review, port: int) -> http.server.ThreadingHTTPServer:
    """Returns a server on 127.0.0.1, which answers once it is started; raises UserError where the port is taken."""
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    except OSError as e:
        raise UserError(f"port={port}: {e.strerror or e}; --port=0 takes any that is free") from None
    server.daemon_threads = True
    server.review = review
    return server


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers this machine's browser alone: another site's page can neither read nor send."""

    def do_GET(self):
        if not self._is_ours():
            return
        url = urllib.parse.urlsplit(self.path)
        asked = {key: values[-1] for key, values in urllib.parse.parse_qs(url.query).items()}
        review = self.server.review
        if url.path == "/":
            self._page()
        elif url.path == "/api/state":
            self._json(review.state(asked.get("expert", "")))
        elif url.path == "/api/item":
            n = asked.get("n", "")
            if n.isdigit() and int(n) < len(review.sample.items):
                self._json(review.item(int(n), asked.get("expert", "")))
            else:
                self._json({"error": f"no document {n!r}"}, 404)
        elif url.path == "/api/results":
            self._json(review.results())
        else:
            self._json({"error": "no such page"}, 404)

    def do_POST(self):
        if not self._is_ours():
            return
        length = self.headers.get("Content-Length", "")
        # a form of another site cannot send this type without asking first, and is not answered then
        if self.path != "/api/label" or self.headers.get_content_type() != "application/json":
            self._json({"error": "no such page"}, 404)
        elif not length.isdigit() or int(length) > MAX_BODY:
            self._json({"error": f"should be at most {MAX_BODY} bytes"}, 413)
        else:
            try:
                sent = json.loads(self.rfile.read(int(length)))
                self._json(self.server.review.put(sent if isinstance(sent, dict) else {}))
            except (UserError, ValueError) as e:
                self._json({"error": str(e)}, 400)
            except RunError as e:  # the disk is full: the page says so and keeps what was typed
                self._json({"error": str(e)}, 507)

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
        body = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce).encode()
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
