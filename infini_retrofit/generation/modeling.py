"""Classes of `transformers` models with Infini layers, for folders that open by themselves.

An export copies this file, and what it imports of this library, beside the weights. Knows nothing
of bases and of files.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

# First: it refuses versions of transformers in which the others would not be found.
from infini_retrofit.generation.versions import PROVEN

# isort: split
from infini_retrofit.generation.generation import enable_generation
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.layer.local_attention import alibi_slopes
from infini_retrofit.model.base_attention import NAME
from infini_retrofit.model.retrofit import infini_modules, insert_infini
from infini_retrofit.model.weights import check_sizes, load_whole, read_by_transformers

# Parts of the names of parameters that stay float32, whatever type the others are loaded in.
KEPT_FLOAT32 = ["gate_logit", "alpha", "memory", "feature_maps"]
_CONFIG = "config.json"
_ADVICE = "download the folder again, or write it by `python -m infini_retrofit.share.export`"


class _InfiniConfig:
    """What a configuration says beside the base's own."""

    infini: dict[str, Any] | None = None  # the fields of `InfiniParams`
    other_layers: str = "segment"  # what the base's own attention sees; or `full`: everything
    proven_transformers: list[str] | None = None  # where generation is the same

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("attn_implementation", NAME)
        self.proven_transformers = list(PROVEN)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read what a file says, and refuse a damaged one by name."""
        InfiniParams.read(config_dict.get("infini"), _CONFIG, _ADVICE)
        if (other := config_dict.get("other_layers")) not in ("segment", "full"):
            raise ValueError(
                f"other_layers of {_CONFIG} must be full or segment, got {other!r}: {_ADVICE}"
            )
        check_sizes(config_dict, _CONFIG, _ADVICE)
        with read_by_transformers(_CONFIG, _ADVICE):
            return super().from_dict(config_dict, **kwargs)


class _InfiniModel:
    """Insertion at construction, and what `transformers` must know about Infini layers."""

    _keep_in_fp32_modules_strict = KEPT_FLOAT32

    def __init__(self, config: _InfiniConfig) -> None:
        super().__init__(config)
        params = InfiniParams.read(config.infini, _CONFIG, _ADVICE)
        insert_infini(self, params)
        enable_generation(self, params, config.other_layers)

    @classmethod
    def from_pretrained(
        cls, folder: Path | str | None, *args: Any, config: Any = None, **options: Any
    ) -> Any:
        """Open a folder, or a name on the Hub, as `transformers` does, but refuse damaged weights.

        With `output_loading_info` the caller checks what was missing.
        """
        load = super().from_pretrained
        if folder is None or options.get("output_loading_info"):
            return load(folder, *args, config=config, **options)
        if config is None:
            config, options = cls.config_class.from_pretrained(
                folder, return_unused_kwargs=True, **options
            )
        with read_by_transformers(f"{folder}/{_CONFIG}", _ADVICE), torch.device("meta"):
            plan = cls(copy.deepcopy(config))
        return load_whole(load, plan, folder, _ADVICE, config=config, **options)

    def initialize_weights(self) -> None:
        """Initialise weights and buffers that no file holds."""
        super().initialize_weights()
        for module in infini_modules(self).values():
            if module.slopes is not None:
                module.slopes = alibi_slopes(module.shape.num_heads).to(module.slopes.device)


class InfiniLlamaConfig(_InfiniConfig, LlamaConfig):
    """Configuration of a Llama with Infini layers."""

    model_type = "infini_llama"

    # The constructor that `transformers` generates would hide its arguments from type checkers.
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class InfiniGPTNeoXConfig(_InfiniConfig, GPTNeoXConfig):
    """Configuration of a GPT-NeoX with Infini layers."""

    model_type = "infini_gpt_neox"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class InfiniLlamaForCausalLM(_InfiniModel, LlamaForCausalLM):
    """A Llama with Infini layers."""

    config_class = InfiniLlamaConfig


class InfiniGPTNeoXForCausalLM(_InfiniModel, GPTNeoXForCausalLM):
    """A GPT-NeoX with Infini layers."""

    config_class = InfiniGPTNeoXConfig


def body_name(model: type) -> str:
    """Return the name of the class that opens a model's body."""
    return model.__name__.replace("ForCausalLM", "Model")


class _Body:
    """Opens as the model without its head: the entry of `AutoModel`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """Open the model, and return its body."""
        return super().from_pretrained(*args, **options).base_model


MODELS = {"llama": InfiniLlamaForCausalLM, "gpt_neox": InfiniGPTNeoXForCausalLM}
for _model in MODELS.values():
    _name = body_name(_model)
    globals()[_name] = type(_name, (_Body, _model), {"__module__": __name__})
