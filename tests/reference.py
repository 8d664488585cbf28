"""The parameters that tests start from, attention by hand, and whole models segment by segment.

What an Infini layer computes, token by token, is put together in infini_retrofit/layer/naive.py.

Axes:
    T  token of a document
    K  key channel
    V  value channel
    P  rotated channel
"""

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.layer.memory import MemoryState, quotient, retrieve
from infini_retrofit.layer.naive import naive_average, naive_feature
from infini_retrofit.layer.state import Carried, Carrier
from infini_retrofit.model.families import FAMILIES, decoder_layers


def infini_params(**over: object) -> InfiniParams:
    """Return Infini-attention as published, in every layer, with some fields changed."""
    fields = {
        "layers": "all",
        "insertion": "replace",
        "init": "base",
        "local": "softmax",
        "positions": "rope",
        "heads": "base",
        "memory": "on",
        "window": 3,
        "update_rule": "linear",
        "feature_map": "elu1",
        "num_features": "base",
        "recall_norm": "none",
        "seed_scaling": False,
        "gate": "head",
        "decay": "none",
        "written_tokens": "all",
        "initial_state": "empty",
        "state_dtype": "float32",
        "bptt_segments": "all",
        "segment_length": 5,
        "local_context": 0,
        "initial_memory_share": 0.3,
    }
    return InfiniParams(**fields | over)


def without_conflicts(form: dict) -> dict:
    """Return a form without what its update rule or local attention does not go with."""
    if form.get("local") == "window_linear":
        form = form | {"recall_norm": "none", "decay": "none", "seed_scaling": False}
    if form.get("update_rule", "linear") != "linear":
        form = form | {"decay": "none", "seed_scaling": False}
    if form.get("update_rule") == "delta_gamma":
        form = form | {"initial_state": "empty"}
    return form


def largest(x: Tensor) -> float:
    """Return the largest absolute value; NaN if there is one."""
    return x.detach().abs().max().item()


def recall(feature: Tensor, state: MemoryState) -> Tensor:
    """Read a memory once for each query; an empty one reads as zeros."""
    return quotient(*retrieve(feature, state))


def naive_recall(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Recall one value for one query (K) from all that was written (T K) and (T V)."""
    weights = torch.stack([naive_feature(query) @ naive_feature(k) for k in key])
    return naive_average(weights, value)


def naive_attend(
    query: Tensor, key: Tensor, value: Tensor, kind: str, bias: Tensor | float = 0.0
) -> Tensor:
    """Attend with one query (K) to all keys (T K) and values (T V) given."""
    if kind == "linear":
        return naive_recall(query, key, value)
    return naive_average(((query * key).sum(-1) / len(query) ** 0.5 + bias).exp(), value)


def segment_loop(
    model: PreTrainedModel,
    input_ids: Tensor,
    segment_length: int,
    read: Literal["own", "off"] = "own",
) -> Tensor:
    """Run documents one segment after another, handing over what crosses the border."""
    outputs: list[Tensor] = []
    carried: dict[int, Carried] = {}
    for begin in range(0, input_ids.shape[1], segment_length):
        ids = input_ids[:, begin : begin + segment_length]
        positions = torch.arange(begin, begin + ids.shape[1]).expand_as(ids)
        carrier = Carrier(num_segments=1, read=read, before=carried)
        hidden = model.base_model(
            input_ids=ids, position_ids=positions, use_cache=False, carrier=carrier
        ).last_hidden_state
        outputs.append(hidden)
        carried = carrier.after
    return torch.cat(outputs, dim=1)


def record_layers(model: PreTrainedModel, input_ids: Tensor) -> dict[str, list[Tensor]]:
    """Note what each layer is given, what its attention returns and what it returns."""
    notes: dict[str, list[Tensor]] = {"given": [], "attention": [], "returned": []}
    name = FAMILIES[model.config.model_type].attention
    hooks = []
    for layer in decoder_layers(model):
        attention = getattr(layer, name)
        hooks += [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: notes["given"].append((*args, *kwargs.values())[0]),
                with_kwargs=True,
            ),
            attention.register_forward_hook(lambda _, __, out: notes["attention"].append(out[0])),
            layer.register_forward_hook(lambda _, __, out: notes["returned"].append(out)),
        ]
    with torch.no_grad():
        model(input_ids=input_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return notes
