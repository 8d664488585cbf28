"""The label of each position, for scores and losses alike.

Knows nothing of how hidden states are computed.

Axes:
    *B  any leading axes: documents, or none
    T  token
    N  position that has a label
    D  model width
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.scoring.losses import token_nlls

# Hidden states that predict, (N D), and the label of each, (N).
Labelled = tuple[Tensor, Tensor]


def next_tokens(ids: Int[Tensor, "*B T"], hidden_states: Float[Tensor, "*B T D"]) -> Labelled:
    """Label every position of a row but the last with the next token."""
    return hidden_states[..., :-1, :].flatten(0, -2), ids[..., 1:].flatten()


def tokens_after_next(
    ids: Int[Tensor, "*B T"], hidden_states: Float[Tensor, "*B T D"], segment_length: int
) -> Labelled:
    """Label as the seeds did, shifting twice: in a segment, position t with token t + 2.

    The seeds left a segment's last token out of the input. Here it is part of it, so that a
    memory or context carried over holds it as well.
    """
    segments = (-1, segment_length)
    hidden_states = hidden_states.unflatten(-2, segments)[..., :-2, :].flatten(0, -2)
    return hidden_states, ids.unflatten(-1, segments)[..., 2:].flatten()


@torch.inference_mode()
def next_token_nlls(
    model: PreTrainedModel, ids: Int[Tensor, "T"], hidden_states: Float[Tensor, "T D"]
) -> Float[Tensor, "T-1"]:
    """Score every token of a row but the first, in nats."""
    return _nlls(model, next_tokens(ids, hidden_states))


@torch.inference_mode()
def t2_nlls(
    model: PreTrainedModel,
    ids: Int[Tensor, "T"],
    hidden_states: Float[Tensor, "T D"],
    segment_length: int,
) -> Float[Tensor, "_"]:
    """Score a document as the seeds did, in nats; see `tokens_after_next`."""
    return _nlls(model, tokens_after_next(ids, hidden_states, segment_length))


def _nlls(model: PreTrainedModel, labelled: Labelled) -> Float[Tensor, "N"]:
    hidden_states, labels = labelled
    return token_nlls(hidden_states, model.get_output_embeddings().weight, labels)
