"""Servers that tests start on 127.0.0.1: S3, Google's storage and the Hugging Face hub."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks.unreliable_server import UnreliableServer, serve


@contextmanager
def serve_s3(folder: Path, bucket: str, before: UnreliableServer) -> Iterator[dict[str, str]]:
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
