"""Servers that are no Hub, or a hostile one: `pull` ends soon, in one line, takes little, and leaves nothing."""

import itertools
import json
import time
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread

import pytest
from huggingface_hub import close_session, constants

from potstill.errors import InputError
from potstill.export import hub

COMMIT = "0123456789" * 4
BLOCK = bytes(1 << 20)
MOST = 40 << 20  # bytes that a test's server may send: a listing of 16 MiB, and what lies in buffers


def head(status=200, **headers):
    lines = [
        f"HTTP/1.1 {status} said",
        "Connection: close",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def body(content, status=200, **headers):
    return [head(status, Content_Length=len(content), **headers), content]


def listing(size=1 << 20, name="policy.safetensors", sha=COMMIT, **more):
    return body(json.dumps({"sha": sha, "siblings": [{"rfilename": name, "size": size}], **more}).encode())


def endless(first=None):
    return itertools.chain([first or head()], itertools.repeat(BLOCK))


def dripping(first):
    yield first
    while True:
        time.sleep(0.02)
        yield b"a"


def silent():
    time.sleep(1.5)
    yield b""


MORE = "sends more than it may: nothing of it is kept"
HEADERS = b"A: b\r\n" * 9999
SLOW = r"has not sent all in|timed out"
NO_HUB = "did not answer as the Hub does"
HUBS = {  # what the listing is answered with, what the policy, and what is said of it
    "says nothing": (silent, None, SLOW),
    "drips its headers": (lambda: dripping(b"HTTP/1.1 200 said\r\nA: "), None, SLOW),
    "drips its listing": (lambda: dripping(head()), None, SLOW),
    "drips the policy": (listing, lambda: dripping(head()), SLOW),
    "never ends its listing": (endless, None, MORE),
    "never ends the policy": (listing, endless, MORE),
    "never ends an error": (lambda: endless(head(500)), None, "answers 500"),
    "never ends a redirect": (listing, lambda: endless(head(302, Location="/nowhere")), "more than 5 times"),
    "redirects to itself": (lambda: body(b"", 302, Location="/"), None, "more than 5 times"),
    "redirects to a file": (listing, lambda: body(b"", 302, Location="file:///etc/passwd"), "cannot reach"),
    "sends headers without end": (
        lambda: itertools.chain([head()[:-2]], itertools.repeat(HEADERS)), None, "cannot reach"
    ),
    "sends a bomb of gzip": (listing, lambda: body(bytes(1001), Content_Encoding="gzip"), "came with 1,001"),
    "sends less than it lists": (listing, lambda: body(b"short"), "came with 5 bytes instead of 1,048,576"),
    "breaks off": (listing, lambda: [head(Content_Length=1 << 20), b"short"], "cannot reach"),
    "does not speak HTTP": (lambda: [b"220 mail.example.org ESMTP\r\n"], None, "cannot reach"),
    "lists a page": (lambda: body(b"<html>Log in first</html>"), None, NO_HUB),
    "lists a list": (lambda: body(b"[]"), None, NO_HUB),
    "lists JSON without end": (lambda: body(b"[" * 100_000), None, NO_HUB),
    "lists no files": (lambda: body(json.dumps({"sha": COMMIT, "siblings": None}).encode()), None, NO_HUB),
    "lists a size in words": (lambda: listing("large"), None, "has an unknown number of bytes"),
    "lists a size below 0": (lambda: listing(-1), None, "has -1 bytes; at most"),
    "lists a size of 2^60": (lambda: listing(1 << 60), None, "at most 1,073,741,824 are downloaded"),
    "lists a name that is none": (lambda: listing(name=7), None, NO_HUB),
    "lists a commit that leads away": (lambda: listing(sha="../../etc"), None, NO_HUB),
    "answers 204": (lambda: [head(204)], None, "answers 204, which the Hub does not"),
    "is out of order": (lambda: body(b"{}", 503), None, "answers 503"),
}  # fmt: skip


class Handler(StreamRequestHandler):
    def handle(self):
        asked = self.rfile.readline(1 << 16).split()
        while self.rfile.readline(1 << 16).strip():
            pass
        listed, sent, _ = HUBS[self.server.kind]
        try:
            for piece in (listed if b"/api/" in asked[1] or sent is None else sent)():
                self.server.sent += len(piece)
                self.wfile.write(piece)
                if self.server.sent > 10 * MOST:
                    break
        except OSError:  # it has seen enough
            pass


class Hub(ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    sent = 0


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = Hub(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(hub, "TIMEOUT", 0.5)
    monkeypatch.setattr(hub, "SLOWEST", 1e9)
    monkeypatch.chdir(tmp_path)
    yield server
    close_session()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", HUBS)
def test_a_pull_from_a_server_that_is_no_hub_ends_and_leaves_nothing(kind, server):
    server.kind = kind
    began = time.monotonic()
    with pytest.raises(InputError, match=HUBS[kind][2]):
        hub.pull("stiller/cart", Path("out"))
    assert time.monotonic() - began < 20
    assert server.sent < MOST
    assert list(Path().iterdir()) == []
