"""RoPE scaling: a base whose rotations are stretched to documents longer than it trained on.

The tables are those of `transformers`. Knows nothing of caches and tasks.

Sources: `linear` Chen et al. 2023, arXiv:2306.15595; `dynamic` and `yarn` Peng et al. 2023,
arXiv:2309.00071; `llama3` Grattafiori et al. 2024, arXiv:2407.21783, section 3.4.2.
"""

import copy
from typing import Literal

from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Scaling = Literal["linear", "dynamic", "yarn", "llama3"]
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of Llama 3.1


def check_plain_rope(model: PreTrainedModel) -> None:
    """Refuse a base with other rotations than plain ones: a scaling would take their place."""
    parameters = getattr(model.config, "rope_parameters", None) or {}
    if (kind := parameters.get("rope_type")) != "default":
        raise ValueError(
            "longcontext.baselines must name none of linear, dynamic, yarn and llama3 where the "
            f"base's rotations are not plain ones (rope_type: default), got rope_type {kind}"
        )


def scale_rope(model: PreTrainedModel, kind: Scaling, factor: float) -> PreTrainedModel:
    """Return a base with scaled rotations, which shares the other's weights.

    `factor` is the length to read over the length that the base trained on.
    """
    made = copy.deepcopy(model, {id(x): x for x in model.parameters()})
    config = made.config
    config.rope_parameters = {
        **config.rope_parameters,
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": config.max_position_embeddings,
        **(_LLAMA3 if kind == "llama3" else {}),
    }
    body = made.base_model
    body.rotary_emb = type(body.rotary_emb)(config).to(made.device)
    if kind == "dynamic":
        # transformers would change the tables in the middle of a document, and keep those of a
        # long document for the next: `fit_length` sets them instead.
        body.rotary_emb.rope_type = "default"
    return made


def fit_length(model: PreTrainedModel, num_tokens: int) -> None:
    """Set the tables of a `dynamic` base to a document's length; of others they never change."""
    config, rotary = model.config, model.base_model.rotary_emb
    if config.rope_parameters["rope_type"] == "dynamic":
        length = max(num_tokens, config.max_position_embeddings)
        tables = ROPE_INIT_FUNCTIONS["dynamic"](config, model.device, seq_len=length)
        rotary.inv_freq, rotary.attention_scaling = tables
