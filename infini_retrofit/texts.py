"""The tokens of prepared texts as tensors.

Knows no path and no model.

Axes:
    B  document or sample
    T  token
"""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Int
from torch import Tensor

from infini_retrofit.corpus import read_token_rows


def read_stream(path: Path, max_tokens: int | None = None) -> Int[Tensor, "T"]:
    """Return the articles one after another, cut after `max_tokens`."""
    tokens = np.concatenate(read_token_rows(path))[:max_tokens]
    return torch.from_numpy(tokens.astype(np.int64))


def read_documents(path: Path, max_documents: int) -> Int[Tensor, "B T"]:
    """Return the first documents, all of one length."""
    rows = read_token_rows(path)[:max_documents]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def read_titles(path: Path, max_documents: int) -> list[str]:
    """Return the title of the article that each of the first documents is cut from."""
    return pq.read_table(path, columns=["title"])["title"].to_pylist()[:max_documents]


def read_samples(path: Path, tokens_per_sample: int, max_samples: int) -> Int[Tensor, "B T"]:
    """Cut articles into samples, the first of every article before the second of any.

    Raises:
        ValueError: if no article is as long as one sample.
    """
    articles = read_token_rows(path)
    samples = [
        article[begin : begin + tokens_per_sample]
        for begin in range(0, max(map(len, articles)), tokens_per_sample)
        for article in articles
        if len(article) >= begin + tokens_per_sample
    ]
    if not samples:
        raise ValueError(
            f"distill.tokens_per_sample must be at most the longest article of {path}, "
            f"{max(map(len, articles))} tokens, got {tokens_per_sample}"
        )
    return torch.from_numpy(np.stack(samples[:max_samples]).astype(np.int64))
