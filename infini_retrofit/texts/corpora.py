"""The choice of texts: sections `corpora` and `longdocs` of params.yaml.

Knows neither how a corpus is read (`articles`) nor how it is split and stored (`splits`).
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from infini_retrofit.pipeline.fields import Commit, InnerPath, LocalPath, RepoId, Share

SAME = "same"

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


Corpus = CorpusShares | HubSplits
CORPORA = {
    "gensim-sample": GensimCorpus,
    "hub": HubCorpus,
    "hub-splits": HubSplits,
    "files": FilesCorpus,
}


@dataclass(frozen=True, kw_only=True)
class LongdocsParams:
    """Section `longdocs` of params.yaml."""

    corpus: str  # a key of `corpora`; SAME: the corpus of the sliding text
    tokens_per_document: Annotated[int, Field(ge=2)]  # the first is not scored
    documents: Literal["all"] | Annotated[int, Field(ge=2)]  # at most, in each split
