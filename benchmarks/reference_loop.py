"""The usual way to score a text in overlapping windows, for comparison.

The model takes one window after another and computes the loss itself. Labels are -100 where a token
was scored before. Unlike the page, this weights each window's mean by its number of scored tokens,
so that its score can be compared with ours.

Source: https://huggingface.co/docs/transformers/perplexity
"""

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.scoring.score import Score

IGNORED = -100  # the loss of `transformers` skips tokens with this label


def score_by_reference_loop(
    model: PreTrainedModel, tokens: Int[Tensor, "T"], window: int, stride: int
) -> Score:
    """Score every token but the first once, in windows of up to `window` tokens."""
    stream = tokens[None].to(model.device)
    nll_sum, num_scored, scored_to = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens))
        input_ids = stream[:, begin:end]
        labels = input_ids.clone()
        labels[:, : scored_to - begin] = IGNORED
        with torch.no_grad():
            loss = model(input_ids, labels=labels).loss
        # The model shifts the labels, so it never scores the first token of a window.
        averaged = int((labels[:, 1:] != IGNORED).sum())
        nll_sum += loss.item() * averaged
        num_scored += averaged
        scored_to = end
        if end == len(tokens):
            break
    return Score(nll_sum, num_scored)
