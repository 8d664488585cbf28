"""Which texts to read: sections `corpora` and `longdocs` of params.yaml.

Knows neither how a corpus is read (`articles`) nor how it is split and stored (`corpus`).
"""

import re
from dataclasses import dataclass
from typing import Literal

SAME = "same"


def check_commit(name: str, revision: str) -> None:
    """Refuse a revision that can move.

    Args:
        name: of the parameter.
        revision: its value.

    Raises:
        ValueError: if it is no commit; where to find one is said.
    """
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise ValueError(
            f"{name} must be a commit of 40 lower-case hexadecimal digits, got {revision!r}: copy "
            "the one that you want from the history of the repository on the Hugging Face Hub"
        )


@dataclass(frozen=True, kw_only=True)
class CorpusShares:
    """What every corpus has: the shares of its articles that are not trained on."""

    val_share: float
    test_share: float

    def __post_init__(self) -> None:
        """Refuse shares that leave a split empty."""
        for name in ("val_share", "test_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"corpora.<preset>.{name} must be a share between 0 and 1, "
                    f"got {getattr(self, name)}"
                )
        if self.val_share + self.test_share >= 1:
            raise ValueError(
                "corpora.<preset>.val_share + test_share must be below 1, to leave articles for "
                f"training, got {self.val_share} + {self.test_share}"
            )


@dataclass(frozen=True, kw_only=True)
class GensimCorpus(CorpusShares):
    """The sample of the English Wikipedia inside the package gensim; needs no network."""


@dataclass(frozen=True, kw_only=True)
class HubCorpus(CorpusShares):
    """Parquet files of a data set on the Hugging Face Hub; its own splits are not kept."""

    repo_id: str
    revision: str
    files: str  # a pattern: no file that it leaves out is downloaded

    def __post_init__(self) -> None:
        """Refuse a revision that can move, and files of another kind."""
        super().__post_init__()
        check_commit("corpora.<preset>.revision", self.revision)
        if not self.files.endswith(".parquet"):
            raise ValueError(
                "corpora.<preset>.files must be a pattern for *.parquet files of the repository, "
                f"got {self.files!r}"
            )


@dataclass(frozen=True, kw_only=True)
class FilesCorpus(CorpusShares):
    """Text or parquet files of the user's own."""

    path: str


CORPORA: dict[str, type[CorpusShares]] = {
    "gensim-sample": GensimCorpus,
    "hub": HubCorpus,
    "files": FilesCorpus,
}


@dataclass(frozen=True, kw_only=True)
class LongdocsParams:
    """Section `longdocs` of params.yaml."""

    corpus: str  # a key of `corpora`, or SAME: the one that `corpus` names
    tokens_per_document: int
    documents: int | Literal["all"]  # of each split, at most

    def __post_init__(self) -> None:
        """Refuse documents in which nothing can be scored, and fewer than can be swapped."""
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
