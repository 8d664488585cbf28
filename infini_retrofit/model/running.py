"""Run documents through a model segment by segment, all segments at once.

Folded: the segments become the batch, so that every layer of the model sees its own segment
only, and only Infini layers look across. Knows nothing of losses or protocols.

Axes:
    B  document
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
from infini_retrofit.model.families import family_of


def fold(x: Int[Tensor, "B T"], segment_length: int) -> Int[Tensor, "BS L"]:
    """Lay segments out as rows of a batch, those of a document one after another."""
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

    Their products with the output embeddings are the logits: where a base scales its logits, the
    hidden states are scaled instead.

    Without `state` the documents begin and end here; `first_position` counts the tokens before
    these.

    Raises:
        ValueError: if the documents are no whole number of segments long.
    """
    num_tokens = input_ids.shape[1]
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
    return scaled(model, hidden_states.reshape(*input_ids.shape, -1))


def run_swapped(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    segment_length: int,
    memories: Mapping[int, MemoryState],
) -> Float[Tensor, "B T D"]:
    """Run folded documents, each reading the memory of the one before it.

    The other document wrote that memory for itself: it holds nothing of the reader. `memories`
    are what `run_folded` noted in `Probe.memories` for these documents, of which there are two
    at least.
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

    They are scaled as those of `run_folded`.
    Each row has a memory that starts empty. Without `segment_length` each Infini layer updates it
    after its own.
    """
    cut, body = Cut(segment_length=segment_length), model.base_model
    out = body(input_ids=input_ids, use_cache=False, cut=cut, probe=probe)
    return scaled(model, out.last_hidden_state)


def scaled(model: PreTrainedModel, hidden_states: Tensor) -> Tensor:
    """Scale hidden states as a base scales its logits."""
    if not family_of(model.config).scales_logits:
        return hidden_states
    return hidden_states / model.config.logits_scaling
