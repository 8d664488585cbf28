"""Two tiny repositories of the Hub, and a server that may fail."""

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save
from tokenizers import normalizers
from transformers import GPTNeoXForCausalLM

from infini_retrofit.bases.sources import BASE_KINDS
from infini_retrofit.pipeline.params import load_presets
from infini_retrofit.texts.corpora import CORPORA
from tests.tiny import tiny_neox, tiny_tokenizer
from tests.tiny_project import ROOT

NUM_ARTICLES = 50
LARGE = (".safetensors", ".parquet", ".bin")  # stored apart, named by their sha256
UNWANTED = b"a file that nobody may ask for"
# As in the repository of Pythia-70m, whose keys have older names.
SIZES = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4}
SIZES |= {"num_hidden_layers": 3, "vocab_size": 288, "max_position_embeddings": 2048}
SIZES |= {"bos_token_id": 0, "eos_token_id": 0}
CONFIG = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "rotary_pct": 0.25}
CONFIG |= {"rotary_emb_base": 10000, "torch_dtype": "float16", "hidden_act": "gelu", **SIZES}
CONFIG |= {"tie_word_embeddings": False, "use_parallel_residual": True}


@dataclass(frozen=True)
class Repository:
    """One commit of a repository; `kind` is `models` or `datasets`."""

    kind: str
    repo_id: str
    revision: str
    files: dict[str, bytes]


def repositories() -> list[Repository]:
    """Make the model and the data set of the project's presets, with unwanted files."""
    models = load_presets(BASE_KINDS, "models", ROOT / "params.yaml")
    corpora = load_presets(CORPORA, "corpora", ROOT / "params.yaml")
    found = [
        ("models", models["pythia-70m"], _pythia_files()),
        ("datasets", corpora["wikitext-2"], _wikitext_files()),
    ]
    return [Repository(kind, it.repo_id, it.revision, files) for kind, it, files in found]


def pythia() -> GPTNeoXForCausalLM:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    return tiny_neox(**SIZES, rope_parameters=rope).half().float()


def file_hash(name: str, content: bytes) -> str:
    """Return the Hub's name of a file's content: its sha256, or git's hash."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _pythia_files() -> dict[str, bytes]:
    """Make the files of a base, with the buffers that old weights hold beside the weights."""
    tokenizer = tiny_tokenizer().backend_tokenizer
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(["    ", "  "])
    weights = {name: weight.half() for name, weight in pythia().state_dict().items()}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"gpt_neox.layers.{layer}.attention"
        weights[f"{prefix}.masked_bias"] = torch.tensor(-1e4)
        weights[f"{prefix}.rotary_emb.inv_freq"] = torch.ones(1)
    about = {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False}
    about |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return {
        "README.md": b"A tiny Pythia.",
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": save(weights, metadata={"format": "pt"}),
        "pytorch_model.bin": UNWANTED,
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(about).encode(),
    }


def _wikitext_files() -> dict[str, bytes]:
    """Make rows as WikiText has them: a line each, titles marked by equals signs."""
    lines = {"train": [], "validation": [], "test": []}
    for i in range(NUM_ARTICLES):
        of_split = lines[("train", "train", "validation", "test")[i % 4]]
        of_split += ["", f" = The town {i} = \n", ""]
        of_split += [f" The town {i} had {j} @,@ 000 dogs . \n" for j in range(3 + i % 5)]
    files = {
        f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet": _parquet(text=rows)
        for split, rows in lines.items()
    }
    return files | {"wikitext-103-raw-v1/test-00000-of-00001.parquet": UNWANTED}


def _parquet(**columns: list[object]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


Answer = tuple[int, bytes, dict[str, str]]  # status, content, headers
FAULTS: dict[str, Answer] = {
    "forbidden": (401, b"", {"X-Error-Code": "RepoNotFound"}),
    "old": (404, b"", {"X-Error-Code": "RevisionNotFound"}),
    "portal": (200, b"<html>Please log in</html>", {}),
}


@dataclass
class Hub:
    """A running server."""

    endpoint: str = ""
    fault: str = ""  # one of FAULTS, cut (half an answer), other (bytes), or empty
    where: str = ""  # a part of the requests that fail, such as `HEAD` or `.parquet`
    asked: list[str] = field(default_factory=list)


@contextmanager
def serve(found: list[Repository]) -> Iterator[Hub]:
    """Answer like the Hub on a free port of this machine."""

    class Handler(_Handler):
        hub = Hub()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Handler.answers = _answers(found, server.server_port)
        Handler.hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield Handler.hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    answers: dict[str, Answer]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.asked.append(request)
        fault = self.hub.fault if self.hub.where in request else ""
        status, content, headers = FAULTS.get(fault) or self.answers[path]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            content = content[::-1] if fault == "other" else content
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        self.close_connection = fault == "cut"

    def log_message(self, *_: object) -> None:
        """Stay silent."""


def _answers(found: list[Repository], port: int) -> dict[str, Answer]:
    """Return the answer to each path: a list of files, a file, or its place on another host."""
    answers: dict[str, Answer] = {}
    for repo in found:
        tree: list[dict[str, object]] = []
        prefix = "" if repo.kind == "models" else f"/{repo.kind}"
        for name, content in repo.files.items():
            size, digest = len(content), file_hash(name, content)
            path = f"{prefix}/{repo.repo_id}/resolve/{repo.revision}/{name}"
            headers = {"X-Repo-Commit": repo.revision}
            tree.append({"type": "file", "path": name, "size": size, "oid": digest})
            if not name.endswith(LARGE):
                answers[path] = 200, content, headers | {"ETag": f'"{digest}"'}
                continue
            tree[-1]["lfs"] = {"oid": digest, "size": size, "pointerSize": 134}
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(size)}
            headers |= {"Location": f"http://localhost:{port}/large/{digest}"}
            answers[path] = 302, b"", headers
            answers[f"/large/{digest}"] = 200, content, {}
        path = f"/api/{repo.kind}/{repo.repo_id}/tree/{repo.revision}"
        answers[path] = 200, json.dumps(tree).encode(), {}
    return answers
