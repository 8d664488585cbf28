"""The tokens for which far context matters: chosen by the base alone, so alike for every model.

Knows nothing of protocols.

Source: Fang et al. 2024, arXiv:2410.23771 (LongPPL), whose gain of full over short context this is.

Axes:
    B  document
    T  token of a document
    Scored  token that is scored: all but the first
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from infini_retrofit.pipeline.files import read_sealed

LEAST_GAIN = 1.0  # nats


@dataclass(frozen=True, kw_only=True)
class KeyTokens:
    """Where the key tokens of each document stand, counted from 0 among those that are scored."""

    num_scored: int  # of each document
    positions: list[list[int]]

    @classmethod
    def of(cls, full: Float[Tensor, "B Scored"], segment: Float[Tensor, "B Scored"]) -> "KeyTokens":
        """Choose the tokens that gain more than `LEAST_GAIN` from full attention."""
        is_key = segment - full > LEAST_GAIN
        return cls(
            num_scored=is_key.shape[1], positions=[row.nonzero()[:, 0].tolist() for row in is_key]
        )

    @property
    def mask(self) -> Bool[Tensor, "B Scored"]:
        """Return True at key tokens."""
        mask = torch.zeros(len(self.positions), self.num_scored, dtype=torch.bool)
        for row, columns in zip(mask, self.positions, strict=True):
            row[columns] = True
        return mask


def read_key_tokens(path: Path, documents: Int[Tensor, "B T"]) -> KeyTokens:
    """Read what `baseline_eval` chose; refuse the choice from other documents."""
    made_by = "dvc repro baseline_eval"
    found = read_sealed(path, KeyTokens, made_by)
    num, num_scored = len(documents), documents.shape[1] - 1
    if (len(found.positions), found.num_scored) != (num, num_scored):
        raise ValueError(
            f"{path} must be of {num} documents with {num_scored} scored tokens each, got "
            f"{len(found.positions)} with {found.num_scored}: delete it and run `{made_by}`"
        )
    if any(not 0 <= column < num_scored for row in found.positions for column in row):
        raise ValueError(
            f"{path} must name tokens in 0..{num_scored - 1}: delete it and run `{made_by}`"
        )
    return found
