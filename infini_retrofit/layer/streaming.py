"""How a document goes on in a later call: by many tokens, or by one at the cost of one.

What a segment's queries can find is laid out here; how they attend to it is the layer's.

Axes:
    B  document
    S  segment of a call
    T  token of a call
    L  token of a segment
    C  key that a segment's queries see: carried over, then its own
    N  key/value head
    K  key channel
    F  feature of a key
    V  value channel
    HK channel of all queries of a token, heads side by side
    HV channel of all outputs of a token, heads side by side
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from infini_retrofit.layer.cut import SegmentCut, place_by
from infini_retrofit.layer.local_context import Keys, LocalContext, context_at, put_before
from infini_retrofit.layer.memory import MemoryState
from infini_retrofit.layer.state import Carried, Carrier, Tokens


@dataclass(frozen=True)
class Segments:
    """What the queries of each segment can find.

    Attributes:
        place: gives queries their positions.
        value: of the segment's own tokens.
        key_feature: of its own keys; None: no linear sum needs them.
        keys: that softmax or linear attention sees, what is carried over first.
        is_key: False where a key must not be seen; None: causality hides all that must not be.
        context: what is carried over the last border; None: nothing.
        found: the memory that each segment finds; None: none is read.
        memory: after the last segment.
        is_older: own tokens that the window of the only query has left behind; None: each query
            of a whole segment has its window.
        num_before: tokens of the segment before its first query; None: none.
    """

    place: Callable[[Tensor], Tensor]
    value: Float[Tensor, "B S N L V"]
    key_feature: Float[Tensor, "B S N L F"] | None
    keys: Keys
    is_key: Bool[Tensor, "B S C"] | None
    context: LocalContext | None = None
    found: MemoryState | None = None
    memory: MemoryState | None = None
    is_older: Bool[Tensor, "B S L"] | None = None
    num_before: Int[Tensor, "B"] | None = None


def go_on(
    layer: nn.Module,
    query: Float[Tensor, "B T HK"],
    new: Tokens,
    before: Carried,
    carrier: Carrier,
) -> tuple[Float[Tensor, "B T HV"], Carried]:
    """Attend with the tokens of a call to themselves and to all that came before them.

    Args:
        layer: an Infini layer.
        query: without position encoding.
        new: the tokens.
        before: what the calls before left.
        carrier: of this call.

    Returns:
        The output of every head, and what the next call needs.
    """
    kept, num_heads = before.unfinished, layer.shape.num_heads
    tokens = new if kept is None else kept.followed_by(new)
    length = carrier.segment_length or layer.segment_length
    is_step = kept is not None and len(new) == 1 and carrier.is_token is None
    if is_step:
        cut = SegmentCut(new.key, Carrier(num_segments=1), 1)
        segments = _running_segment(layer, cut, tokens, new, before, carrier)
        out = cut.join(layer.attend(cut.split(query, num_heads), segments, carrier))
        if len(tokens) < length:
            return out, replace(before, unfinished=tokens)
    is_token = None if carrier.is_token is None and len(tokens) == len(new) else tokens.is_token
    cut = SegmentCut(tokens.key, Carrier(is_token=is_token), length)
    segments = layer.lay_out(cut, tokens.key, tokens.value, tokens.tables, before, carrier)
    if not is_step:
        # Tokens of earlier calls ask again, for nothing: fewer than a segment's.
        num_kept = len(tokens) - len(new)
        query = cut.split(F.pad(query, (0, 0, num_kept, 0)), num_heads)
        out = cut.join(layer.attend(query, segments, carrier))[:, num_kept:]
    return out, _carry_on(segments, tokens, before, length, layer.local_context)


def _running_segment(
    layer: nn.Module,
    cut: SegmentCut,
    tokens: Tokens,
    new: Tokens,
    before: Carried,
    carrier: Carrier,
) -> Segments:
    """Lay out what the last token of a segment that has not ended can find."""
    all_tokens = SegmentCut(tokens.key, Carrier(num_segments=1, is_token=tokens.is_token), 1)
    place = place_by(all_tokens, tokens.tables)
    key = all_tokens.split(tokens.key, layer.shape.num_kv_heads)
    value = all_tokens.split(tokens.value, layer.shape.num_kv_heads)
    is_older = feature = found = None
    keys = Keys(place(key), value, all_tokens.is_token)
    if before.context is not None:
        keys = put_before(keys, before.context)
        if layer.slopes is not None:
            keys = _keys_last(keys)
    if layer.local == "window_linear":
        # Hidden only now: what the window has left behind still lies between it and the context.
        distance = torch.arange(len(tokens), device=key.device).flip(0)
        is_older = all_tokens.is_token & (distance >= layer.window)
        is_hidden = F.pad(is_older, (keys.is_key.shape[-1] - len(tokens), 0))
        keys = replace(keys, is_key=keys.is_key & ~is_hidden)
        feature = layer.feature_maps.of_key(key)
    if layer.reads(carrier):
        found = MemoryState(before.memory.matrix[:, None], before.memory.normalizer[:, None])
    return Segments(
        place=place_by(cut, new.tables),
        value=value,
        key_feature=feature,
        keys=keys,
        is_key=keys.is_key,
        found=found,
        is_older=is_older,
        num_before=tokens.is_token.sum(dim=1) - 1,
    )


def _keys_last(keys: Keys) -> Keys:
    """Move what is no key to the front, so that distances between keys are those of tokens."""
    order = keys.is_key.int().argsort(dim=-1, stable=True)
    by_head = order[:, :, None, :, None]
    key, value = (x.take_along_dim(by_head, dim=3) for x in (keys.key, keys.value))
    return Keys(key, value, keys.is_key.gather(-1, order))


def _carry_on(
    segments: Segments, tokens: Tokens, before: Carried, segment_length: int, num_carried: int
) -> Carried:
    """Return what each row carries over its last border, and the tokens behind that."""
    border = tokens.num_whole(segment_length)
    memory, context = None, before.context
    if segments.found is not None:
        memory = _state_at(segments.found, segments.memory, border)
    if segments.context is not None:
        context = context_at(segments.keys, segments.context, border, num_carried)
    return Carried(memory, context, tokens.after(border * segment_length))


def _state_at(found: MemoryState, last: MemoryState, border: Int[Tensor, "B"]) -> MemoryState:
    """Return each row's memory at a border: 0 before the first segment."""
    num_segments = found.normalizer.shape[1]
    rows = torch.arange(len(border), device=border.device)
    is_last = border == num_segments
    index = border.clamp(max=num_segments - 1)
    matrix = found.matrix[rows, index]
    matrix = torch.where(is_last[:, None, None, None], last.matrix, matrix)
    normalizer = found.normalizer[rows, index]
    normalizer = torch.where(is_last[:, None, None], last.normalizer, normalizer)
    return MemoryState(matrix, normalizer).to(last.matrix.dtype)
