"""Read the tokens of prepared texts as tensors; `vocab_size` is the base's.

Knows no path and no model.

Axes:
    B  document or sample
    T  token
    Stream  token of the stream
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from infini_retrofit.pipeline.tables import check_lengths, read_table, read_token_rows


@dataclass(frozen=True)
class TestText:
    """The texts of the test split, on which models are scored."""

    stream: Int[Tensor, "Stream"]  # all articles, one after another
    documents: Int[Tensor, "B T"]
    sources: list[str]  # of each document: documents of one source are not independent


def read_test_text(
    articles: Path, documents: Path, vocab_size: int, max_tokens: int, max_documents: int
) -> TestText:
    """Read the start of a stream, and the first documents with their sources."""
    return TestText(
        read_stream(articles, vocab_size, max_tokens),
        read_documents(documents, vocab_size, max_documents),
        read_sources(documents, max_documents),
    )


def read_stream(path: Path, vocab_size: int, max_tokens: int | None = None) -> Int[Tensor, "T"]:
    """Return the articles one after another, cut after `max_tokens`."""
    tokens = np.concatenate(read_token_rows(path, vocab_size))[:max_tokens]
    return torch.from_numpy(tokens.astype(np.int64))


def read_documents(path: Path, vocab_size: int, max_documents: int) -> Int[Tensor, "B T"]:
    """Return the first documents, all of one length."""
    rows = read_token_rows(path, vocab_size)
    check_lengths(path, rows)
    return torch.from_numpy(np.stack(rows[:max_documents]).astype(np.int64))


def read_sources(path: Path, max_documents: int) -> list[str]:
    """Return the source of each of the first documents: a package, or the article alone."""
    rows = read_table(path, ["title", "source"]).to_pylist()
    return [row["source"] or row["title"] for row in rows[:max_documents]]


def read_samples(
    path: Path, vocab_size: int, tokens_per_sample: int, max_samples: int
) -> Int[Tensor, "B T"]:
    """Cut articles into samples: the first of each article, then the second of each."""
    articles = read_token_rows(path, vocab_size)
    longest = max(map(len, articles))
    if longest < tokens_per_sample:
        raise ValueError(
            f"distill.tokens_per_sample must be at most the longest article of {path}, "
            f"{longest} tokens, got {tokens_per_sample}"
        )
    samples = [
        article[begin : begin + tokens_per_sample]
        for begin in range(0, longest, tokens_per_sample)
        for article in articles
        if len(article) >= begin + tokens_per_sample
    ]
    return torch.from_numpy(np.stack(samples[:max_samples]).astype(np.int64))
