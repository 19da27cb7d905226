"""Servers that tests start on 127.0.0.1: one that misbehaves as networks do, and S3."""

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Hostile:
    """An HTTP server over a folder: what it does wrong, and what it has counted."""

    folder: Path
    unavailable: float = 0.0  # share of requests answered by 503
    reset: float = 0.0  # share broken off in the middle of the body
    slow: float = 0.0  # share answered late
    ranges: bool = True
    stalled: set[str] = field(default_factory=set)  # names that are never answered
    sent: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    url: str = ""
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_fault(self) -> str:
        with self.lock:
            draw = self.chance.random()
        for name in ("unavailable", "reset", "slow"):
            draw -= getattr(self, name)
            if draw < 0:
                return name
        return ""


@contextmanager
def serve(server: Hostile) -> Iterator[Hostile]:
    """Serve until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            name = self.path.lstrip("/")
            path = server.folder / name
            if name in server.stalled:
                time.sleep(60)
                return
            if not path.is_file():
                self.reply(404, b"", 0, body)
                return
            fault = server.next_fault()
            data, status, total = path.read_bytes(), 200, path.stat().st_size
            if server.ranges and (asked := self.headers.get("Range")):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                begin = int(first) if first else total - int(last)
                data, status = data[begin : int(last) + 1 if first and last else None], 206
                self.content_range = f"bytes {begin}-{begin + len(data) - 1}/{total}"
            if fault == "unavailable":
                self.reply(503, b"", 0, body)
                return
            if fault == "slow":
                time.sleep(0.2)
            if body:
                with server.lock:
                    server.requests[name] += 1
            self.reply(status, data, len(data) // 2 if fault == "reset" and body else None, body)

        def reply(self, status: int, data: bytes, cut: int | None, body: bool) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if server.ranges:
                self.send_header("Accept-Ranges", "bytes")
            if status == 206:
                self.send_header("Content-Range", self.content_range)
            self.end_headers()
            if body:
                self.wfile.write(data[:cut])
                with server.lock:
                    server.sent += len(data[:cut])
            if cut is not None and data:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()  # a reset, not an orderly end
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Clients that hang up are what this server is for."""

    running = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{running.server_address[1]}"
    try:
        yield server
    finally:
        running.shutdown()
        running.server_close()


@contextmanager
def serve_s3(folder: Path, bucket: str) -> Iterator[dict[str, str]]:
    """Run moto's S3 with a folder's files in a bucket; yield the environment that leads s3fs there."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    access = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        client = boto3.client(
            "s3",
            endpoint_url=access["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        client.create_bucket(Bucket=bucket)
        for path in folder.iterdir():
            client.upload_file(str(path), bucket, path.name)
        yield access
    finally:
        server.stop()
