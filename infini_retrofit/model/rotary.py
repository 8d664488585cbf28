"""Rotation tables that move with the length of a text, held still: RoPE `dynamic` and `longrope`.

Scores see differences of positions only, and a retrofit's attention reaches no farther than a
segment and what is carried into it. So its table is the one of a text of that length, wherever in
a document a segment stands: reading token by token then gives what one forward pass gives.
"""

import inspect
from types import MethodType

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from infini_retrofit.layer.form import InfiniParams

_MOVING = ("dynamic", "longrope")


def hold_tables(model: PreTrainedModel, params: InfiniParams, num_chosen: int) -> None:
    """Hold a model's rotation table at the reach of a form, in place, if it moves at all.

    `num_chosen` is the number of layers that become Infini layers.

    Raises:
        ValueError: if some of the base's own attention would still see whole texts.
    """
    rotary = getattr(model.base_model, "rotary_emb", None)
    kind = getattr(rotary, "rope_type", None)
    if kind not in _MOVING or not num_chosen:
        return
    if num_chosen < model.config.num_hidden_layers or params.insertion != "replace":
        raise ValueError(
            "infini.layers must be all and infini.insertion replace for a base whose rotations "
            f"change with the length of a text (rope_type {kind}), got {params.layers} and "
            f"{params.insertion}"
        )
    rotary.reach = params.segment_length + params.local_context
    if kind == "dynamic":  # beyond these positions its table differs from one length to the next
        rotary.reach = min(rotary.reach, rotary.original_max_seq_len)
    rotary.max_seq_len_cached = 0  # so that `dynamic` computes its table again
    rotary.forward = MethodType(_held_forward, rotary)


@torch.no_grad()
def _held_forward(
    rotary: nn.Module, x: Tensor, position_ids: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T P"], Float[Tensor, "B T P"]]:
    """Return cosines and sines by the table of a text of `rotary.reach` tokens."""
    forward = type(rotary).forward  # chooses the table by the last position
    forward(rotary, x, position_ids.new_full((1, 1), rotary.reach - 1))
    return inspect.unwrap(forward)(rotary, x, position_ids)
