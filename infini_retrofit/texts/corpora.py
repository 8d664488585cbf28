"""The choice of texts: sections `corpora` and `longdocs` of params.yaml.

Knows neither how a corpus is read (`articles`) nor how it is split and stored (`splits`).
"""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

SAME = "same"
Share = Annotated[float, Field(gt=0, lt=1)]


def check_commit(name: str, revision: str) -> None:
    """Refuse a revision that is no commit, such as a branch."""
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise ValueError(
            f"{name} must be a commit of 40 lower-case hexadecimal digits, got {revision!r}: copy "
            "one from the history of the repository on the Hugging Face Hub"
        )


@dataclass(frozen=True, kw_only=True)
class CorpusShares:
    """The shares of a corpus's articles that no model trains on."""

    val_share: Share
    test_share: Share

    def __post_init__(self) -> None:
        """Refuse shares that leave no articles for training."""
        if self.val_share + self.test_share >= 1:
            raise ValueError(
                "corpora.<preset>.val_share + test_share must be below 1, to leave articles for "
                f"training, got {self.val_share} + {self.test_share}"
            )


@dataclass(frozen=True, kw_only=True)
class GensimCorpus(CorpusShares):
    """The Wikipedia sample inside the package gensim; needs no network."""


@dataclass(frozen=True, kw_only=True)
class HubSplits:
    """Parquet files of a data set on the Hub, each of the split that begins its name."""

    repo_id: str
    revision: str
    files: str  # a pattern; other files are not downloaded

    def __post_init__(self) -> None:
        """Refuse a revision that is no commit, and other files than parquet."""
        check_commit("corpora.<preset>.revision", self.revision)
        if not self.files.endswith(".parquet"):
            raise ValueError(
                "corpora.<preset>.files must be a pattern for *.parquet files of the repository, "
                f"got {self.files!r}"
            )


@dataclass(frozen=True, kw_only=True)
class HubCorpus(CorpusShares, HubSplits):
    """Parquet files of a data set on the Hub, whose own splits are ignored."""

    def __post_init__(self) -> None:
        """Refuse what either base refuses."""
        CorpusShares.__post_init__(self)
        HubSplits.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class FilesCorpus(CorpusShares):
    """The user's own text or parquet files."""

    path: str


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
