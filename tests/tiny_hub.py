"""Three tiny repositories as the Hub has them, and a folder laid out as its cache."""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

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

NUM_ARTICLES, NUM_BOOKS = 50, 60
LARGE = (".safetensors", ".parquet", ".bin")  # kept apart by the Hub, and named by their sha256
UNWANTED = b"a file that nobody may ask for"
# As the repository of Pythia-70m has it, in the words of its time.
CONFIG = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 32,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_parallel_residual": True,
    "vocab_size": 288,
}


@dataclass(frozen=True)
class Repository:
    """One commit of a repository; `kind` is `models` or `datasets`."""

    kind: str
    repo_id: str
    revision: str
    files: dict[str, bytes]

    @property
    def cache_name(self) -> str:
        """The folder's name in the Hub's cache."""
        return f"{self.kind}--{self.repo_id.replace('/', '--')}"


def repositories() -> list[Repository]:
    """Make the model and the two data sets of the project's presets, each with unwanted files."""
    base = load_presets(BASE_KINDS, "models", ROOT / "params.yaml")["pythia-70m"]
    corpora = load_presets(CORPORA, "corpora", ROOT / "params.yaml")
    wikitext, pg19 = corpora["wikitext-2"], corpora["pg19"]
    return [
        Repository("models", base.repo_id, base.revision, _pythia_files()),
        Repository("datasets", wikitext.repo_id, wikitext.revision, _wikitext_files()),
        Repository("datasets", pg19.repo_id, pg19.revision, _pg19_files()),
    ]


def pythia() -> GPTNeoXForCausalLM:
    """Make the model whose weights the repository holds, rounded to 16 bits as they are."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    names = set(CONFIG) - {"architectures", "model_type", "rotary_emb_base", "rotary_pct"}
    sizes = {name: CONFIG[name] for name in names - {"torch_dtype"}}
    return tiny_neox(**sizes, rope_parameters=rope).half().float()


def file_hash(name: str, content: bytes) -> str:
    """Return what the Hub calls a file's content: sha256, or the hash that git has for it."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def write_cache(folder: Path, found: list[Repository]) -> None:
    """Lay out a folder as the Hub's cache, with what a download would have brought."""
    for repository in found:
        top = folder / repository.cache_name
        for name, content in repository.files.items():
            blob = top / "blobs" / file_hash(name, content)
            pointer = top / "snapshots" / repository.revision / name
            for path in (blob, pointer):
                path.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            pointer.symlink_to(Path(*[".."] * len(Path(name).parts), "..", "blobs", blob.name))


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


def _pg19_files() -> dict[str, bytes]:
    """Make rows as PG-19 has them: a book each, under the columns of that data set."""
    books = range(NUM_BOOKS)
    test = _parquet(
        short_book_title=[f"The Sea, volume {i}" for i in books],
        publication_date=[1800 + i for i in books],
        url=[f"http://example.org/{i}" for i in books],
        text=["\n".join(f"Chapter {j} of {i}." for j in range(8 + i % 9)) for i in books],
    )
    return {
        "data/test-00000-of-00001-29a571947c0b5ccc.parquet": test,
        "data/train-00000-of-00023-5263dc4323e881d2.parquet": UNWANTED,
    }


def _parquet(**columns: list[object]) -> bytes:
    """Write a parquet file into memory."""
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()
