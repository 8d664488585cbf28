"""The choice of texts: sections `corpora` and `longdocs` of params.yaml.

Knows neither how a corpus is read (`articles`) nor how it is split and stored (`splits`).
"""

import re
from dataclasses import dataclass
from typing import Literal

SAME = "same"


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

    val_share: float
    test_share: float

    def __post_init__(self) -> None:
        """Refuse shares that leave a split without articles."""
        for name in ("val_share", "test_share"):
            if not 0 < (share := getattr(self, name)) < 1:
                raise ValueError(
                    f"corpora.<preset>.{name} must be a share between 0 and 1, got {share}"
                )
        if self.val_share + self.test_share >= 1:
            raise ValueError(
                "corpora.<preset>.val_share + test_share must be below 1, to leave articles for "
                f"training, got {self.val_share} + {self.test_share}"
            )


@dataclass(frozen=True, kw_only=True)
class GensimCorpus(CorpusShares):
    """The Wikipedia sample inside the package gensim; needs no network."""


@dataclass(frozen=True, kw_only=True)
class HubCorpus(CorpusShares):
    """Parquet files of a data set on the Hub, whose own splits are ignored."""

    repo_id: str
    revision: str
    files: str  # a pattern; other files are not downloaded

    def __post_init__(self) -> None:
        """Refuse a revision that is no commit, and other files than parquet."""
        super().__post_init__()
        check_commit("corpora.<preset>.revision", self.revision)
        if not self.files.endswith(".parquet"):
            raise ValueError(
                "corpora.<preset>.files must be a pattern for *.parquet files of the repository, "
                f"got {self.files!r}"
            )


@dataclass(frozen=True, kw_only=True)
class FilesCorpus(CorpusShares):
    """The user's own text or parquet files."""

    path: str


CORPORA = {"gensim-sample": GensimCorpus, "hub": HubCorpus, "files": FilesCorpus}


@dataclass(frozen=True, kw_only=True)
class LongdocsParams:
    """Section `longdocs` of params.yaml."""

    corpus: str  # a key of `corpora`; SAME: the corpus of the sliding text
    tokens_per_document: int
    documents: int | Literal["all"]  # at most, in each split

    def __post_init__(self) -> None:
        """Refuse too few tokens to score, and too few documents to swap."""
        if self.tokens_per_document < 2:
            raise ValueError(
                "longdocs.tokens_per_document must be at least 2 tokens, "
                f"got {self.tokens_per_document}"
            )
        if self.documents != "all" and self.documents < 2:
            raise ValueError(
                "longdocs.documents must be all or at least 2 documents of each split, "
                f"got {self.documents}"
            )
