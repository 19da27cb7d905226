"""Servers that tests start on 127.0.0.1: one that misbehaves as networks do, S3, Google's storage and the hub."""

import json
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
class Hostile:
    """An HTTP server over a folder, or before another server: what it does wrong, and what it has counted."""

    folder: Path
    unavailable: float = 0.0  # share of requests answered by 503
    reset: float = 0.0  # share broken off in the middle of the body
    slow: float = 0.0  # share answered late
    ranges: bool = True
    upstream: str = ""  # "host:port" of the server it stands before
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
            if name in server.stalled:
                time.sleep(60)
                return
            fault = server.next_fault()
            status, data, headers = self.forwarded() if server.upstream else self.served(server.folder / name)
            if fault == "unavailable":
                self.reply(503, b"", {}, 0, body)
                return
            if fault == "slow":
                time.sleep(0.2)
            if body:
                with server.lock:
                    server.requests[name] += 1
            self.reply(status, data, headers, len(data) // 2 if fault == "reset" and body else None, body)

        def served(self, path: Path) -> tuple[int, bytes, dict[str, str]]:
            if not path.is_file():
                return 404, b"", {}
            data, total = path.read_bytes(), path.stat().st_size
            if not server.ranges:
                return 200, data, {}
            if not (asked := self.headers.get("Range")):
                return 200, data, {"Accept-Ranges": "bytes"}
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin = int(first) if first else total - int(last)
            data = data[begin : int(last) + 1 if first and last else None]
            sent = f"bytes {begin}-{begin + len(data) - 1}/{total}"
            return 206, data, {"Accept-Ranges": "bytes", "Content-Range": sent}

        def forwarded(self) -> tuple[int, bytes, dict[str, str]]:
            connection = HTTPConnection(server.upstream, timeout=30)
            connection.request(self.command, self.path, headers=dict(self.headers))
            answer = connection.getresponse()
            data = answer.read()
            headers = {name: value for name, value in answer.getheaders() if name.lower() in KEPT_HEADERS}
            if self.command == "HEAD":
                headers["Content-Length"] = answer.getheader("Content-Length") or "0"
            return answer.status, data, headers

        def reply(self, status: int, data: bytes, headers: dict[str, str], cut: int | None, body: bool) -> None:
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
                self.connection.close()  # a reset, not an orderly end
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

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
def serve_s3(folder: Path, bucket: str, before: Hostile) -> Iterator[dict[str, str]]:
    """Run moto's S3 with a folder's files in a bucket, and a server before it that misbehaves.

    Yields the environment that leads s3fs there.
    """
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
        before.upstream = f"{host}:{port}"
        with serve(before):
            yield {**access, "AWS_ENDPOINT_URL": before.url}
    finally:
        server.stop()


@contextmanager
def serve_gs(folder: Path, bucket: str) -> Iterator[dict[str, str]]:
    """Run an emulator of Google's storage with a folder's files in a bucket; yields the environment for gcsfs."""
    import requests
    from gcp_storage_emulator.server import create_server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True)
    server.start()
    url = f"http://127.0.0.1:{port}"
    try:
        requests.post(f"{url}/storage/v1/b", json={"name": bucket}, timeout=10).raise_for_status()
        for path in folder.iterdir():
            place = f"{url}/upload/storage/v1/b/{bucket}/o?uploadType=media&name={path.name}"
            requests.post(place, data=path.read_bytes(), timeout=10).raise_for_status()
        yield {"STORAGE_EMULATOR_HOST": url}
    finally:
        server.stop()


@contextmanager
def serve_hub(folder: Path) -> Iterator[str]:
    """Answer as Hugging Face's hub does for a dataset `user/set` that holds a folder's files; yields its URL."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    commit = "0" * 40

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            place = self.path.partition("?")[0]
            name = place.rpartition("/")[2]
            if place.startswith("/datasets/") and name in files:
                first, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")
                piece = files[name][int(first) : int(last) + 1 if last else None]
                self.reply(206 if "Range" in self.headers else 200, piece)
            elif "/tree/" in place:
                listed = [{"type": "file", "path": name, "size": len(files[name]), "oid": commit} for name in files]
                self.reply(200, json.dumps(listed).encode())
            elif place.startswith("/api/datasets/"):
                self.reply(200, json.dumps({"id": "user/set", "sha": commit, "siblings": []}).encode())
            else:
                self.reply(404, b"")

        def reply(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", "x")
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
