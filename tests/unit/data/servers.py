"""Local servers that speak as the places do that data comes from, and lose connections on purpose."""

import hashlib
import http.client
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Served:
    """What a server offers and what happened."""

    files: dict[str, bytes]
    """By path; the hub: by name within the repository."""
    cut_after: int = 0
    """Bytes after which a transfer is cut; 0: never."""
    cuts_left: int = 0
    ranges: bool = True
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range)"""
    tokens: set[str | None] = field(default_factory=set)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Served
    repo: str | None

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def _answer(self, *, send_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.served.requests.append((self.command, path, self.headers.get("Range")))
        self.served.tokens.add(self.headers.get("Authorization"))
        if self.repo is None:
            self._send_file(path.lstrip("/"), send_body, {})
        elif path.startswith(f"/api/datasets/{self.repo}/tree/"):
            self._send_json([self._entry(name) for name in self.served.files])
        elif path.startswith(f"/api/datasets/{self.repo}"):
            siblings = [{"rfilename": n, "size": len(c)} for n, c in self.served.files.items()]
            self._send_json({"id": self.repo, "sha": COMMIT, "siblings": siblings, "private": False})
        elif match := re.fullmatch(rf"/datasets/{self.repo}/resolve/[^/]+/(.+)", path):
            self._send_file(match[1], send_body, {"X-Repo-Commit": COMMIT})
        else:
            self.send_error(404)

    def _entry(self, name: str) -> dict[str, object]:
        content = self.served.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, name: str, send_body: bool, headers: dict[str, str]) -> None:
        if name not in self.served.files:
            self.send_error(404)
            return
        content = self.served.files[name]
        start = 0
        if self.served.ranges and (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")):
            start = int(match[1])
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content) - start))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if not send_body:
            return
        body = content[start:]
        if self.served.cuts_left and len(body) > self.served.cut_after:
            self.served.cuts_left -= 1
            self.wfile.write(body[: self.served.cut_after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(body)


@contextmanager
def serve(served: Served, *, repo: str | None = None) -> Iterator[Served]:
    """Serve files under their paths, or as a hub's data set of that name."""
    handler = type("Handler", (_Handler,), {"served": served, "repo": repo})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # cut connections are the point
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Fault:
    """What the next requests meet that ask for a path with `match` in it."""

    match: str
    kind: str
    """reset: closed without an answer; cut: closed in the middle of the body; 503, 403: an answer of that status."""
    left: int

    def applies(self, method: str, path: str) -> bool:
        """Whether a request meets it."""
        return self.left > 0 and self.match in path and (self.kind != "cut" or method == "GET")


@dataclass
class Proxy:
    """A proxy that hands requests on, or not."""

    port: int
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range)"""
    url: str = ""


class _ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._hand_on()

    def do_HEAD(self) -> None:
        self._hand_on()

    def _hand_on(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.proxy.requests.append((self.command, path, self.headers.get("Range")))
        fault = next((f for f in self.proxy.faults if f.applies(self.command, path)), None)
        if fault is not None:
            fault.left -= 1
        kind = fault.kind if fault else ""
        self.close_connection = kind != ""
        if kind == "reset":
            return
        if kind.isdigit():
            self.send_response(int(kind))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.proxy.port)
        upstream.request(self.command, self.path, headers=dict(self.headers))
        answer = upstream.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)
        upstream.close()


@contextmanager
def serve_proxy(port: int) -> Iterator[Proxy]:
    """Stand in front of a local server."""
    proxy = Proxy(port)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_ProxyHandler,), {"proxy": proxy}))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    proxy.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
