"""A Hugging Face Hub on 127.0.0.1, as much of it as huggingface_hub needs to download a model, or upload one."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from loopback_upload import Uploads

MAIN_COMMIT = "a" * 40


@dataclass
class Repo:
    """One model repository.

    Attributes:
        revisions: Files by commit, each a mapping from name to content.
        branches: Commit by branch or tag.
        gated: The listing is public and the files are refused, as the hub does to accounts that are not let in.
        token: What a request must present; None lets everyone in.
        status: An HTTP status that every request gets instead of an answer.
        file_status: One that requests for files get, after a listing that is answered.
        cut: Names of files whose next download ends halfway, once each.
    """

    revisions: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    gated: bool = False
    token: str | None = None
    status: int | None = None
    file_status: int | None = None
    cut: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Request:
    """One request as the server saw it; `file` is set where a file's content or its metadata was asked for."""

    method: str
    path: str
    file: str | None
    range: str | None
    authorization: str | None


class LoopbackHub:
    """The server: `with LoopbackHub() as hub: hub.add("org/name", {...})`; `hub.url` is for HF_ENDPOINT."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.sent_bytes: Counter[str] = Counter()  # of files' content, by name
        self.is_login_page = False  # answers everything with a web page, as a captive portal does
        self.uploads = Uploads(self)
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, repo_id: str, files: dict[str, bytes], *, commit: str = MAIN_COMMIT, branch: str = "main") -> Repo:
        repo = self.repos.setdefault(repo_id, Repo({}, {}))
        repo.revisions[commit] = files
        repo.branches[branch] = commit
        return repo

    def downloads(self) -> list[str]:
        """Names of the files whose content was requested, in order."""
        return [request.file for request in self.requests if request.method == "GET" and request.file is not None]

    def close(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    request_queue_size = (
        64  # five, the base's default, drops some of the eight downloads that start at once for a second
    )


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub  # HTTP/1.0, the base's default, ends a connection with each answer: nothing outlives a test

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        api = path.removeprefix("api/models/")
        file = None
        if api != path:
            kind, rest = "info", api
            for marker in ("revision", "tree"):
                if f"/{marker}/" in api:
                    kind, rest = marker, api
            repo_id, _, revision = rest.partition(f"/{kind}/")
        else:
            kind = "resolve"
            repo_id, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
        headers = self.headers
        self.hub.requests.append(
            Request(self.command, path, file or None, headers.get("Range"), headers.get("Authorization"))
        )

        length = int(headers.get("Content-Length") or 0)
        for part, status in self.hub.uploads.faults.items():
            if part in path:
                self.rfile.read(length if status is not None else length // 2)
                return None if status is None else self._send(status)
        body = self.rfile.read(length)
        if self.hub.is_login_page:
            return self._send(200, b"<html>please log in</html>", {"Content-Type": "text/html"})
        if answer := self.hub.uploads.answer(self.command, path, headers.get("Authorization"), body):
            return self._send_json(answer[1], status=answer[0])
        repo = self.hub.repos.get(repo_id)
        if repo is not None and repo.status is not None:
            return self._send(repo.status)
        if repo is None or (repo.token is not None and headers.get("Authorization") != f"Bearer {repo.token}"):
            return self._send(404 if repo is None else 401, headers={"X-Error-Code": "RepoNotFound"})
        commit = repo.branches.get(revision or "main", revision)
        if commit not in repo.revisions:
            return self._send(404, headers={"X-Error-Code": "RevisionNotFound"})
        files = repo.revisions[commit]
        if kind in ("info", "revision"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            return self._send_json({"id": repo_id, "sha": commit, "siblings": siblings})
        if kind == "tree":
            return self._send_json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
            )
        if repo.file_status is not None:
            return self._send(repo.file_status)
        if repo.gated:
            return self._send(403, headers={"X-Error-Code": "GatedRepo"})
        if file not in files:
            return self._send(404, headers={"X-Error-Code": "EntryNotFound"})
        self._send_file(repo, file, files[file], commit)

    def _send_file(self, repo: Repo, name: str, data: bytes, commit: str) -> None:
        start, total = 0, len(data)
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, data = int(first), data[: int(last) + 1 if last else total]
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{total}"
        length = len(data) - start
        if self.command == "GET" and name in repo.cut:
            repo.cut.discard(name)
            data = data[: start + length // 2]
        if self.command == "GET":
            self.hub.sent_bytes[name] += len(data) - start
        self._send(206 if wanted else 200, data[start:], headers, length=length)

    def _send_json(self, value: object, *, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, *, length: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
