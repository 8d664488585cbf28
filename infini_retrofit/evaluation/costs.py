"""What the rivals cost: the bytes of their state, and their operations.

Knows sizes only.
"""

from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel

from infini_retrofit.evaluation import pointer
from infini_retrofit.evaluation.dynamic import RANK, adapted_modules
from infini_retrofit.evaluation.rival import Rival, make_windowed, state_token_bytes
from infini_retrofit.evaluation.selected import BYTES_PER_MASS
from infini_retrofit.model.families import decoder_layers
from infini_retrofit.model.retrofit import attention_shapes, state_bytes

BYTES_PER_WEIGHT = 3 * 4  # of an adapter, with Adam's two moments, float32


def rival_costs(
    model: PreTrainedModel, rival: Rival, names: Collection[str], num_tokens: int
) -> dict[str, int]:
    """Return `<rival>_state_bytes` and `<rival>_operations` of a base's rivals.

    State is what crosses a border, the window included, for one document of `num_tokens`.
    Operations are multiply-adds and additions a token, beyond those of the base with the retrofit's
    window; of the pointer: look-ups, too.
    """
    num_stored = min(pointer_tokens(model, rival), num_tokens)
    window = state_bytes(make_windowed(model, rival))
    costs = {
        "kv": _kv(model, rival),
        "selected": _selected(model, rival),
        # A look-up for each length of a match; the mixture takes two multiplications.
        "pointer": (window + num_stored * _bytes_per_id(model), pointer.MOST_MATCHED + 2),
        "dynamic": _dynamic(model, rival, window),
    }
    costs = {name: cost for name, cost in costs.items() if name == "kv" or name in names}
    return {
        f"{name}_{what}": cost
        for name, both in costs.items()
        for what, cost in zip(("state_bytes", "operations"), both, strict=True)
    }


def pointer_tokens(model: PreTrainedModel, rival: Rival) -> int:
    """Count the token ids that the bytes of the selected tokens hold."""
    return rival.num_selected * state_token_bytes(model) // _bytes_per_id(model)


def _bytes_per_id(model: PreTrainedModel) -> int:
    return 2 if model.config.vocab_size <= 2**16 else 4


def _kv(model: PreTrainedModel, rival: Rival) -> tuple[int, int]:
    shape, num_layers = attention_shapes(model)[0], model.config.num_hidden_layers
    more = rival.num_tokens * num_layers - rival.local_context * len(rival.layers)
    # A query times a key, and its weight times a value.
    operations = 2 * more * shape.num_heads * shape.head_dim
    return rival.num_tokens * state_token_bytes(model), operations


def _selected(model: PreTrainedModel, rival: Rival) -> tuple[int, int]:
    shape, num_layers = attention_shapes(model)[0], model.config.num_hidden_layers
    state, operations = _kv(model, rival)
    masses = rival.num_tokens * num_layers * shape.num_kv_heads * BYTES_PER_MASS
    sums = num_layers * shape.num_heads * (rival.num_tokens + (rival.segment_length + 1) // 2)
    return state + masses, operations + sums


def _dynamic(model: PreTrainedModel, rival: Rival, window: int) -> tuple[int, int]:
    shape, modules = attention_shapes(model)[0], adapted_modules(model)
    weights = sum(RANK * (m.in_features + m.out_features) for m in modules)
    # Gradients reach back to the first adapter: through the head and the layers behind it.
    behind = decoder_layers(model)[len(decoder_layers(model)) - len(modules) + 1 :]
    passed = [m for layer in behind for m in layer.modules() if isinstance(m, nn.Linear)]
    passed.append(model.get_output_embeddings())
    linear = sum(module.weight.numel() for module in passed)
    num_keys = rival.local_context + (rival.segment_length + 1) // 2
    attention = 4 * num_keys * shape.num_heads * shape.head_dim * len(behind)
    # An adapter is used forwards, for the gradients of its weights and of its input.
    return window + weights * BYTES_PER_WEIGHT, 3 * weights + linear + attention
