"""A Hugging Face Hub on loopback, as far as huggingface_hub needs one: descriptions, files, refusals, failures."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

DESCRIPTION = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")
FILE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


@dataclasses.dataclass
class Repository:
    """Files by name; every revision shows the same ones."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    token: str | None = None
    """The token without which the repository does not exist, like a private one."""
    is_gated: bool = False

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files)).encode()).hexdigest()


@dataclasses.dataclass
class Failure:
    """A failure of the next `times` requests whose path ends with `path`."""

    path: str
    times: int = 1
    status: int | None = None
    """The status to answer with; None sends half of the file,"""
    hangs: bool = False
    """and then closes the connection, or leaves it open and sends nothing more."""


@dataclasses.dataclass(frozen=True)
class Request:
    method: str
    path: str
    authorization: str | None
    byte_range: str | None


class HubStandIn:
    """Repositories by id; every request is noted."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[str, Repository] = {}
        self.failures: list[Failure] = []
        self.requests: list[Request] = []
        self.is_hanging = threading.Event()
        self.is_over = threading.Event()

    def add(self, model_id: str, folder: Path | None = None, **more: bytes) -> Repository:
        """A repository with all files below `folder`, and further ones named `more` with `__` for a dot."""
        paths = [path for path in folder.rglob("*") if path.is_file()] if folder else []
        files = {str(path.relative_to(folder or "")): path.read_bytes() for path in paths}
        files |= {name.replace("__", "."): content for name, content in more.items()}
        self.repositories[model_id] = Repository(files)
        return self.repositories[model_id]

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for."""
        matches = [FILE.fullmatch(request.path) for request in self.requests if request.method == "GET"]
        return [match["name"] for match in matches if match]

    def take_failure(self, method: str, path: str) -> Failure | None:
        for failure in self.failures:
            if path.endswith(failure.path) and failure.times and (failure.status is not None or method == "GET"):
                failure.times -= 1
                return failure
        return None


@contextlib.contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """A Hub for the time of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = HubStandIn(f"http://127.0.0.1:{server.server_port}")
    _Handler.hubs[server.server_port] = hub
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.is_over.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hubs: dict[int, HubStandIn] = {}

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        assert isinstance(self.server, ThreadingHTTPServer)
        self.hub = self.hubs[self.server.server_port]
        path = urlsplit(self.path).path
        authorization = self.headers.get("Authorization")
        self.hub.requests.append(Request(self.command, path, authorization, self.headers.get("Range")))
        failure = self.hub.take_failure(self.command, path)
        if failure is not None and failure.status is not None:
            return self._refuse(failure.status)
        match = DESCRIPTION.fullmatch(path) or FILE.fullmatch(path)
        repository = self.hub.repositories.get(match["id"]) if match else None
        if match is None or repository is None:
            return self._refuse(404, "RepoNotFound")
        if repository.token is not None and authorization is None:
            return self._refuse(401, "RepoNotFound")
        if repository.token is not None and authorization != f"Bearer {repository.token}":
            return self._refuse(401, message="Invalid credentials in Authorization header")
        if unquote(match["revision"] or "main") not in (*repository.revisions, repository.commit):
            return self._refuse(404, "RevisionNotFound")
        if match.re is DESCRIPTION:
            return self._describe(match["id"], repository)
        if repository.is_gated:
            return self._refuse(403, "GatedRepo")
        content = repository.files.get(unquote(match["name"]))
        if content is None:
            return self._refuse(404, "EntryNotFound")
        self._send_file(repository, content, failure)

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _describe(self, model_id: str, repository: Repository) -> None:
        siblings = [{"rfilename": name, "size": len(content)} for name, content in repository.files.items()]
        body = {"id": model_id, "sha": repository.commit, "siblings": siblings}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send_file(self, repository: Repository, content: bytes, failure: Failure | None) -> None:
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": repository.commit}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if start else 200, content[start:], headers, failure)

    def _send(self, status: int, body: bytes, headers: dict[str, str], failure: Failure | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if failure is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        self.close_connection = True
        if failure.hangs:
            self.hub.is_hanging.set()
            self.hub.is_over.wait()
