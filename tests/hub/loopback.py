"""A Hub on the loopback interface, in memory: what create, preupload, LFS, commit and download ask of it.

Written from huggingface_hub's own requests. It keeps a log, knows one token, and can be told to stop answering after a
number of uploaded objects.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_loopback"


@dataclass
class Repository:
    """Files by branch and by commit."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: int = 0
    history: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()

    def at(self, revision: str | None) -> dict[str, bytes] | None:
        """The files of a branch or of a commit; None for neither."""
        return self.branches.get(revision or "main", self.history.get(revision or ""))


class Hub(ThreadingHTTPServer):
    """`log` has (method, path) of every request, `objects` the LFS store."""

    daemon_threads = True

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.silent_after: int | None = None
        self.stopped = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def puts(self) -> list[str]:
        """The objects that were sent, in order."""
        return [path.rpartition("/")[2] for method, path in self.log if method == "PUT"]


@contextmanager
def loopback_hub() -> Iterator[Hub]:
    """A Hub that answers while the context lasts."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stopped.set()
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub  # pyright: ignore

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def _serve(self) -> None:
        path, body = unquote(urlparse(self.path).path), self._body()
        self.server.log.append((self.command, path))
        if self.command in ("POST", "PUT") and not path.startswith("/objects/") and not self._knows_token():
            self._answer(401, {"error": "Invalid credentials"})
            return
        for pattern, answer in ROUTES:
            if (match := re.fullmatch(pattern, f"{self.command} {path}")) is not None:
                answer(self, body, *match.groups())
                return
        self._answer(404, {"error": f"no {self.command} {path}"}, {"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _knows_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, code: int, document: Any = None, headers: dict[str, str] | None = None, raw: bytes | None = None):
        content = json.dumps(document).encode() if raw is None else raw
        self.send_response(code)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = name in self.server.repositories
        self.server.repositories.setdefault(
            name, Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        )
        url = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        self._answer(409 if known else 200, url | ({"error": "exists"} if known else {}))

    def validate(self, body: bytes) -> None:
        del body
        self._answer(200, {"errors": [], "warnings": []})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        del body
        branches = self.server.repositories[name].branches
        known = branch in branches
        branches.setdefault(branch, dict(branches["main"]))
        self._answer(409 if known else 200, {})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        del name, revision
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        del name
        objects = []
        for asked in json.loads(body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.objects:
                href = f"{self.server.url}/objects/{asked['oid']}"
                entry["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if self.server.silent_after is not None and len(self.server.objects) >= self.server.silent_after:
            self.server.stopped.wait(60)
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._answer(200, raw=b"")

    def commit(self, body: bytes, name: str, revision: str) -> None:
        repository = self.server.repositories[name]
        files = repository.branches[revision]
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        repository.commits += 1
        repository.history[repository.sha] = dict(files)
        url = f"{self.server.url}/{name}/commit/{repository.sha}"
        self._answer(200, {"success": True, "commitUrl": url, "commitOid": repository.sha, "hookOutput": ""})

    def info(self, body: bytes, name: str, revision: str | None) -> None:
        del body
        repository = self.server.repositories.get(name)
        files = repository.at(revision) if repository else None
        if repository is not None and repository.gated and not self._knows_token():
            self._answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
            return
        if repository is None or files is None:
            code = "RepoNotFound" if repository is None else "RevisionNotFound"
            self._answer(404, {"error": "not found"}, {"X-Error-Code": code})
            return
        listed = [{"rfilename": path} for path in files]
        self._answer(
            200, {"id": name, "sha": repository.sha, "private": repository.private, "tags": [], "siblings": listed}
        )

    def tree(self, body: bytes, name: str, revision: str) -> None:
        del body
        repository = self.server.repositories[name]
        files = repository.at(revision) or {}
        found = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]
        self._answer(200, found)

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        del body
        repository = self.server.repositories.get(name)
        if repository is None:
            self._answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        content = (repository.at(revision) or {}).get(path)
        commit = {"X-Repo-Commit": repository.sha}
        if content is None:
            self._answer(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound", **commit})
            return
        self._answer(200, raw=content, headers={"ETag": f'"{hashlib.sha1(content).hexdigest()}"', **commit})


_NAME = r"([^/]+/[^/]+)"
ROUTES = (
    (r"POST /api/repos/create", _Handler.create),
    (rf"POST /api/models/{_NAME}/branch/(.+)", _Handler.branch),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /objects/(\w+)", _Handler.store),
    (rf"POST /api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (rf"GET /api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    (rf"GET /api/models/{_NAME}(?:/revision/(.+))?", _Handler.info),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
