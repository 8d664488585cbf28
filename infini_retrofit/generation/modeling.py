"""Classes of `transformers` models with Infini layers, for folders that open by themselves.

An export copies this file, and what it imports of this library, beside the weights. Knows nothing
of bases and of files.
"""

from typing import Any

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from infini_retrofit.generation.generation import enable_generation
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.layer.local_attention import alibi_slopes
from infini_retrofit.model.base_attention import NAME
from infini_retrofit.model.retrofit import infini_modules, insert_infini

# Parts of the names of parameters that stay float32, whatever type the others are loaded in.
KEPT_FLOAT32 = ["gate_logit", "alpha", "memory", "feature_maps"]


class _InfiniConfig:
    """What a configuration says beside the base's own."""

    infini: dict[str, Any] | None = None  # the fields of `InfiniParams`
    other_layers: str = "segment"  # what the base's own attention sees; or `full`: everything

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("attn_implementation", NAME)
        super().__post_init__(**kwargs)


class _InfiniModel:
    """Insertion at construction, and what `transformers` must know about Infini layers."""

    _keep_in_fp32_modules_strict = KEPT_FLOAT32

    def __init__(self, config: _InfiniConfig) -> None:
        super().__init__(config)
        params = InfiniParams(**config.infini)
        insert_infini(self, params)
        enable_generation(self, params, config.other_layers)

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


MODELS = {"llama": InfiniLlamaForCausalLM, "gpt_neox": InfiniGPTNeoXForCausalLM}
