"""A server on this machine that answers as the Hub does, or fails as it may."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from tests.tiny_hub import LARGE, Repository, file_hash


@dataclass
class Hub:
    """A running server, what it was asked for, and how it fails.

    Attributes:
        fault: gone, forbidden, old (no such commit), broken, cut, other (bytes), portal; or none.
        where: what a request must contain to fail, such as `HEAD` or `.parquet`.
    """

    endpoint: str
    fault: str = ""
    where: str = ""
    asked: list[str] = field(default_factory=list)


@contextmanager
def serve(found: list[Repository]) -> Iterator[Hub]:
    """Answer on a free port of this machine as the Hub does."""
    hub = Hub("")

    class Handler(_Handler):
        state, repositories = hub, found

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One request: the list of a commit's files, a file, or where a large file lies."""

    state: Hub
    repositories: list[Repository]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.state.asked.append(request)
        self.fault = self.state.fault if self.state.where in request else ""
        refused = {"gone": (404, "EntryNotFound"), "forbidden": (401, "RepoNotFound")}
        refused |= {"old": (404, "RevisionNotFound"), "broken": (500, "")}
        if self.fault in refused:
            status, code = refused[self.fault]
            self._answer(status, b"", {"X-Error-Code": code})
        elif self.fault == "portal":
            self._answer(200, b"<html>Please log in</html>", {})
        else:
            self._find(path)

    def _find(self, path: str) -> None:
        for repo in self.repositories:
            if path == f"/api/{repo.kind}/{repo.repo_id}/tree/{repo.revision}":
                return self._answer(200, json.dumps(_tree(repo)).encode(), {})
            prefix = "" if repo.kind == "models" else f"/{repo.kind}"
            for name, content in repo.files.items():
                if path == f"{prefix}/{repo.repo_id}/resolve/{repo.revision}/{name}":
                    return self._send(repo, name, content)
                if path == f"/large/{file_hash(name, content)}":
                    return self._answer(200, content, {})
        return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _send(self, repo: Repository, name: str, content: bytes) -> None:
        headers = {"X-Repo-Commit": repo.revision}
        content_hash = file_hash(name, content)
        if not name.endswith(LARGE):
            self._answer(200, content, headers | {"ETag": f'"{content_hash}"'})
            return
        headers |= {"X-Linked-Etag": f'"{content_hash}"', "X-Linked-Size": str(len(content))}
        # Large files lie on another host.
        location = f"http://localhost:{self.server.server_port}/large/{content_hash}"
        self._answer(302, b"", headers | {"Location": location})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        if self.fault == "other":
            content = content[::-1]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if self.fault == "cut" else content)
        self.close_connection = self.fault == "cut"

    def log_message(self, *_: object) -> None:
        """Stay silent."""


def _tree(repository: Repository) -> list[dict[str, object]]:
    """List the files of a commit."""
    entries = []
    for name, content in repository.files.items():
        size, content_hash = len(content), file_hash(name, content)
        entry = {"type": "file", "path": name, "size": size, "oid": content_hash}
        if name.endswith(LARGE):
            entry |= {"lfs": {"oid": content_hash, "size": size, "pointerSize": 134}}
        entries.append(entry)
    return entries
