"""Run documents through a model segment by segment, all segments at once.

Folded: the segments become the batch, so that every layer of the model sees its own segment
only, and nothing but Infini layers look across. Knows nothing of losses or protocols.

Axes:
    B  document
    S  segment
    L  token of a segment
    T  token of a document
    D  model width
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.layer.memory import MemoryState
from infini_retrofit.layer.state import Carrier, Read


def fold(x: Int[Tensor, "B T"], segment_length: int) -> Int[Tensor, "BS L"]:
    """Lay segments out as rows of a batch, those of a document one after another.

    Raises:
        ValueError: if a document is no whole number of segments long.
    """
    if x.shape[1] % segment_length:
        raise ValueError(
            f"a document must be a whole number of segments of {segment_length} tokens, "
            f"got {x.shape[1]} tokens"
        )
    return x.reshape(-1, segment_length)


def run_folded(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    segment_length: int,
    read: Read = "own",
    carrier: Carrier | None = None,
    first_position: int = 0,
) -> Float[Tensor, "B T D"]:
    """Return the last hidden states of documents of which each layer sees one segment.

    Args:
        model: a base or retrofitted model.
        input_ids: documents of equal length.
        segment_length: tokens.
        read: the memory that is read, see `Carrier`.
        carrier: what the layers start with, and where they leave what they end with; its
            `num_segments` and `read` are set here.
        first_position: tokens of the documents that came before these.
    """
    num_documents, num_tokens = input_ids.shape
    carrier = Carrier() if carrier is None else carrier
    carrier.num_segments, carrier.read = num_tokens // segment_length, read
    # Positions count through the document: scores see differences only, and keys carried into
    # the next segment are then already in their place.
    positions = torch.arange(num_tokens, device=input_ids.device) + first_position
    positions = positions.expand_as(input_ids)
    hidden_states = model.base_model(
        input_ids=fold(input_ids, segment_length),
        position_ids=fold(positions, segment_length),
        use_cache=False,
        carrier=carrier,
    ).last_hidden_state
    return hidden_states.reshape(num_documents, num_tokens, -1)


def run_swapped(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    segment_length: int,
    found: Mapping[int, MemoryState],
) -> Float[Tensor, "B T D"]:
    """Do what `run_folded` does, each document reading the memory of the one before it.

    That memory is what the other document wrote for itself: nothing of its own comes back.

    Args:
        model: a retrofitted model.
        input_ids: at least two documents of equal length.
        segment_length: tokens.
        found: what `run_folded` noted in `Carrier.found` for the same documents.
    """
    strangers = {layer: state.roll_batch() for layer, state in found.items()}
    return run_folded(model, input_ids, segment_length, carrier=Carrier(strangers=strangers))


def run_in_layer(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    segment_length: int | None = None,
    read: Read = "own",
) -> Float[Tensor, "B T D"]:
    """Return the last hidden states of rows that the base's layers see whole.

    Args:
        model: a base or retrofitted model.
        input_ids: rows of equal length, each with a memory of its own that starts empty.
        segment_length: tokens after which an Infini layer updates its memory; None: its own.
        read: the memory that is read, see `Carrier`.
    """
    carrier = Carrier(segment_length=segment_length, read=read)
    return model.base_model(input_ids=input_ids, use_cache=False, carrier=carrier).last_hidden_state
