"""Run documents through a model segment by segment, all segments at once.

Folded: the segments become the batch, so that every layer of the model sees its own segment
only, and only Infini layers look across. Knows nothing of losses or protocols.

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

from infini_retrofit.layer.cut import Cut
from infini_retrofit.layer.memory import MemoryState
from infini_retrofit.layer.probe import Probe
from infini_retrofit.layer.state import State


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
    probe: Probe | None = None,
    state: State | None = None,
    first_position: int = 0,
) -> Float[Tensor, "B T D"]:
    """Return the last hidden states of documents; every layer sees one segment.

    Args:
        model: a base or retrofitted model.
        input_ids: documents of equal length.
        segment_length: tokens.
        probe: what to read in place of the memory, and what to note; None: nothing.
        state: what crosses calls; None: the documents begin and end here.
        first_position: tokens of the documents before these.
    """
    num_documents, num_tokens = input_ids.shape
    # Positions count through the document: scores see differences only, and keys carried into
    # the next segment are then already in their place.
    positions = torch.arange(num_tokens, device=input_ids.device) + first_position
    positions = positions.expand_as(input_ids)
    hidden_states = model.base_model(
        input_ids=fold(input_ids, segment_length),
        position_ids=fold(positions, segment_length),
        use_cache=False,
        cut=Cut(num_segments=num_tokens // segment_length),
        state=state,
        probe=probe,
    ).last_hidden_state
    return hidden_states.reshape(num_documents, num_tokens, -1)


def run_swapped(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    segment_length: int,
    memories: Mapping[int, MemoryState],
) -> Float[Tensor, "B T D"]:
    """Run folded documents, each reading the memory of the one before it.

    The other document wrote that memory for itself: it holds nothing of the reader.

    Args:
        model: a retrofitted model.
        input_ids: at least two documents of equal length.
        segment_length: tokens.
        memories: by layer, as `run_folded` noted them in `Probe.memories` for these documents.
    """
    swapped = {layer: state.roll_batch() for layer, state in memories.items()}
    return run_folded(model, input_ids, segment_length, Probe(swapped=swapped))


def run_in_layer(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    segment_length: int | None = None,
    probe: Probe | None = None,
) -> Float[Tensor, "B T D"]:
    """Return the last hidden states of rows that the base's layers see whole.

    Args:
        model: a base or retrofitted model.
        input_ids: rows of equal length, each with a memory of its own that starts empty.
        segment_length: tokens after which an Infini layer updates its memory; None: its own.
        probe: what to read in place of the memory, and what to note; None: nothing.
    """
    cut = Cut(segment_length=segment_length)
    body = model.base_model
    return body(input_ids=input_ids, use_cache=False, cut=cut, probe=probe).last_hidden_state
