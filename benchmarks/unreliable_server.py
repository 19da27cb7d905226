"""Serve files over HTTP with random failures, for `input.py` and for the tests of remote data."""

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEPT_HEADERS = {"accept-ranges", "content-range", "content-type", "etag", "last-modified"}


@dataclass
class UnreliableServer:
    """Settings and counters of an HTTP server that fails at random, over a folder or in front of another server.

    Attributes:
        folder: Folder whose files are served.
        unavailable: Share of requests that get status 503.
        reset: Share of requests whose connection is reset in the middle of the body.
        slow: Share of requests whose response is late.
        ranges: Whether the server supports range requests.
        upstream: "host:port" of the server to forward requests to, instead of reading files.
        stalled: Names of files whose requests never get a response.
        sent: Bytes of all bodies sent so far.
        requests: Number of bodies sent so far, by name.
        url: Address of the server while it runs.
        generator: Generator that decides which requests fail.
        lock: Lock that guards the counters and the generator.
    """

    folder: Path
    unavailable: float = 0.0
    reset: float = 0.0
    slow: float = 0.0
    ranges: bool = True
    upstream: str = ""
    stalled: set[str] = field(default_factory=set)
    sent: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    url: str = ""
    generator: random.Random = field(default_factory=lambda: random.Random(0))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_fault(self) -> str:
        """Return the fault of the next request, or an empty string."""
        with self.lock:
            draw = self.generator.random()
        for name in ("unavailable", "reset", "slow"):
            draw -= getattr(self, name)
            if draw < 0:
                return name
        return ""


@contextmanager
def serve(server: UnreliableServer) -> Iterator[UnreliableServer]:
    """Run the server until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.respond(body=False)

        def do_GET(self) -> None:
            self.respond(body=True)

        def respond(self, body: bool) -> None:
            name = self.path.lstrip("/")
            if name in server.stalled:
                time.sleep(60)
                return
            fault = server.next_fault()
            status, data, headers = self.forward() if server.upstream else self.read(server.folder / name)
            if fault == "unavailable":
                self.send(503, b"", {}, 0, body)
                return
            if fault == "slow":
                time.sleep(0.2)
            if body:
                with server.lock:
                    server.requests[name] += 1
            self.send(status, data, headers, len(data) // 2 if fault == "reset" and body else None, body)

        def read(self, path: Path) -> tuple[int, bytes, dict[str, str]]:
            if not path.is_file():
                return 404, b"", {}
            data, total = path.read_bytes(), path.stat().st_size
            if not server.ranges:
                return 200, data, {}
            if not (requested := self.headers.get("Range")):
                return 200, data, {"Accept-Ranges": "bytes"}
            first, _, last = requested.removeprefix("bytes=").partition("-")
            start = int(first) if first else total - int(last)
            data = data[start : int(last) + 1 if first and last else None]
            sent = f"bytes {start}-{start + len(data) - 1}/{total}"
            return 206, data, {"Accept-Ranges": "bytes", "Content-Range": sent}

        def forward(self) -> tuple[int, bytes, dict[str, str]]:
            connection = HTTPConnection(server.upstream, timeout=30)
            connection.request(self.command, self.path, headers=dict(self.headers))
            response = connection.getresponse()
            data = response.read()
            headers = {name: value for name, value in response.getheaders() if name.lower() in KEPT_HEADERS}
            if self.command == "HEAD":
                headers["Content-Length"] = response.getheader("Content-Length") or "0"
            return response.status, data, headers

        def send(self, status: int, data: bytes, headers: dict[str, str], cut: int | None, body: bool) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data[:cut])
                with server.lock:
                    server.sent += len(data[:cut])
            if cut is not None and data:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()  # with SO_LINGER 0 this sends a reset
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: object) -> None:
            """Ignore clients that close the connection early."""

    running = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{running.server_address[1]}"
    try:
        yield server
    finally:
        running.shutdown()
        running.server_close()
