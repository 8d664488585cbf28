"""`infini-export --push`: the folder on a server instead of the Hub, and what it refuses."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants, hf_api

from infini_retrofit.share import exported_folder
from tests.tiny_export import export, make_retrofit

REPO = "org/name"
ADDRESS = f"https://huggingface.co/{REPO}"


class _Hub(BaseHTTPRequestHandler):
    """Takes files as the Hub does, all in the commit itself."""

    refused = ""  # a part of the paths that are answered with 403
    files: dict[str, bytes]
    asked: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(self.path)
        status, answer = 200, {"url": ADDRESS, "errors": [], "warnings": []}
        if self.refused and self.refused in self.path:
            status, answer = 403, {"error": "no right to write"}
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            keys = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": name, **keys} for name in names]}
        elif "/commit/" in self.path:
            lines = map(json.loads, body.splitlines())
            for line in lines:
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer |= {"commitOid": "0" * 40, "commitUrl": f"{ADDRESS}/commit/0"}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def hub(monkeypatch):
    """A server instead of the Hub, and a token for it."""
    handler = type("Handler", (_Hub,), {"files": {}, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler
        server.shutdown()


def test_the_folder_that_was_exported_is_pushed(hub, tmp_path, capsys):
    make_retrofit(tmp_path, "llama")
    out = export(tmp_path / "models", tmp_path / "open", "--push", REPO)
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert hub.asked[0] == "/api/repos/create"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("pushed to http://127.0.0.1:")
    assert last.endswith(f"/{REPO}")


@pytest.mark.parametrize(
    ("repo_id", "refused", "said"),
    [
        ("a/b/c", "", "error: Repo id must be in the form"),
        (REPO, "create", "error: org/name cannot be made .*no right to.*: run `hf auth login"),
        (REPO, "commit", "error: .*open cannot be pushed .*: run `hf upload org/name .*open` to"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_export_where_it_can_be(
    hub, tmp_path, monkeypatch, repo_id, refused, said
):
    make_retrofit(tmp_path, "llama")
    hub.refused = refused
    if refused != "commit":
        monkeypatch.setattr(exported_folder, "load_retrofit", pytest.fail)
    with pytest.raises(SystemExit, match=said):
        export(tmp_path / "models", tmp_path / "open", "--push", repo_id)
    assert (tmp_path / "open").exists() == (refused == "commit")
