"""Google's Cloud Storage and metadata server on loopback: it lists and sends files, notes requests, fails when told."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "ya29.secret"
OBJECTS = "/storage/v1/b/bucket/o"


@dataclasses.dataclass
class BucketStandIn:
    """What the bucket `bucket` holds, and what was asked."""

    host: str
    files: dict[str, bytes]
    updated: str = "2026-11-28T01:02:03.456Z"
    page_size: int = 2
    needs_token: bool = True
    has_metadata_server: bool = True
    failures: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    """Object -> statuses of its next answers; 0 breaks off in the middle."""
    fetched: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    """Objects in the order in which they were asked for, each with the range."""

    @property
    def environ(self) -> dict[str, str]:
        return {"STORAGE_EMULATOR_HOST": f"http://{self.host}", "GCE_METADATA_HOST": self.host}


@contextlib.contextmanager
def bucket_stand_in(files: dict[str, bytes]) -> Iterator[BucketStandIn]:
    """Serve `files`, by their names in the bucket."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    stand_in = _Handler.stand_ins[server.server_port] = BucketStandIn(f"127.0.0.1:{server.server_port}", files)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    stand_ins: dict[int, BucketStandIn] = {}

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        assert isinstance(self.server, ThreadingHTTPServer)
        self.stand_in = self.stand_ins[self.server.server_port]
        url = urlsplit(self.path)
        if url.path.startswith("/computeMetadata/"):
            is_there = self.stand_in.has_metadata_server and self.headers["Metadata-Flavor"] == "Google"
            return self._send(200 if is_there else 404, json.dumps({"access_token": TOKEN}).encode())
        if self.stand_in.needs_token and self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._send(401)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if url.path == OBJECTS:
            return self._list(query.get("prefix", ""), int(query.get("pageToken", "0")))
        if not url.path.startswith(f"{OBJECTS}/") or query.get("alt") != "media":
            return self._send(404)
        return self._send_file(unquote(url.path.removeprefix(f"{OBJECTS}/")))

    def _list(self, prefix: str, start: int) -> None:
        """A page of the objects right below the prefix."""
        files = {name: content for name, content in self.stand_in.files.items() if name.startswith(prefix)}
        names = [name for name in files if "/" not in name.removeprefix(prefix)]
        page = names[start : start + self.stand_in.page_size]
        items = [{"name": name, "size": str(len(files[name])), "updated": self.stand_in.updated} for name in page]
        more = {"nextPageToken": str(start + len(page))} if start + len(page) < len(names) else {}
        self._send(200, json.dumps({"items": items, **more}).encode())

    def _send_file(self, name: str) -> None:
        self.stand_in.fetched.append((name, self.headers["Range"]))
        status = (self.stand_in.failures.get(name) or [200]).pop(0)
        content = self.stand_in.files.get(name)
        if content is None or status not in (0, 200):
            return self._send(status if content is not None else 404)
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self._send(206 if start else 200, content[start:], is_cut=status == 0)

    def _send(self, status: int, body: bytes = b"", *, is_cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if is_cut else body)
