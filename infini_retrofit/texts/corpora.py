"""The choice of texts: sections `corpora` and `longdocs` of params.yaml.

Knows neither how a corpus is read (`articles`) nor how it is split and stored (`splits`).
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from infini_retrofit.pipeline.fields import (
    Commit,
    Count,
    InnerPath,
    LocalPath,
    RepoId,
    Requirement,
    Share,
    Weight,
)
from infini_retrofit.texts.prompts import PromptsPerDocument

SAME = "same"
Packages = Annotated[list[Requirement], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class CorpusShares:
    """The shares of a corpus's articles that no model trains on."""

    val_share: Share
    test_share: Share

    def __post_init__(self) -> None:
        """Refuse shares that leave no articles for training."""
        if self.val_share + self.test_share >= 1:
            raise ValueError(
                f"val_share + test_share must be below 1, got {self.val_share} + {self.test_share}"
            )


@dataclass(frozen=True, kw_only=True)
class GensimCorpus(CorpusShares):
    """The Wikipedia sample inside the package gensim; needs no network."""


@dataclass(frozen=True, kw_only=True)
class HubSplits:
    """Parquet files of a data set on the Hub, each of the split that begins its name."""

    repo_id: RepoId
    revision: Commit
    files: InnerPath  # a pattern; other files are not downloaded


@dataclass(frozen=True, kw_only=True)
class HubCorpus(CorpusShares, HubSplits):
    """Parquet files of a data set on the Hub, whose own splits are ignored."""


@dataclass(frozen=True, kw_only=True)
class FilesCorpus(CorpusShares):
    """The user's own text or parquet files."""

    path: LocalPath


@dataclass(frozen=True, kw_only=True)
class PackagesCorpus:
    """Python sources of installed packages, `name==version` each; no package is in two splits."""

    train: Packages
    val: Packages
    test: Packages
    min_characters: PositiveInt  # of a file; shorter ones are left out
    files_per_package: PositiveInt  # at most, so that no package makes up a split

    def __post_init__(self) -> None:
        """Refuse a package that stands twice."""
        names = [name.partition("==")[0] for name in (*self.train, *self.val, *self.test)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"train, val and test must name a package once, got {twice[0]} twice")


@dataclass(frozen=True, kw_only=True)
class PromptsCorpus:
    """Prompts that hide what they ask for, each as long as a document; for longdocs only."""

    train: Count  # documents, text included
    val: Annotated[int, Field(ge=2)]
    test: Annotated[int, Field(ge=2)]
    prompts: PromptsPerDocument
    text_share: Weight  # of them that are plain text of the split


Corpus = CorpusShares | HubSplits | PackagesCorpus
CORPORA = {
    "gensim-sample": GensimCorpus,
    "hub": HubCorpus,
    "hub-splits": HubSplits,
    "files": FilesCorpus,
    "packages": PackagesCorpus,
    "prompts": PromptsCorpus,
}


@dataclass(frozen=True, kw_only=True)
class LongdocsParams:
    """Section `longdocs` of params.yaml."""

    corpus: str  # a key of `corpora`; SAME: the corpus of the sliding text
    tokens_per_document: Annotated[int, Field(ge=2)]  # the first is not scored
    documents: Literal["all"] | Annotated[int, Field(ge=2)]  # at most, in each split
