"""Classes of `transformers` models with Infini layers, for folders that open by themselves.

An export copies this file, and what it imports of this library, beside the weights. Knows nothing
of bases and of files.
"""

import copy
import functools
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# First: it refuses versions of transformers in which the others would not be found.
from infini_retrofit.generation.versions import PROVEN

# isort: split
from infini_retrofit.generation.generation import enable_generation
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.layer.local_attention import alibi_slopes
from infini_retrofit.model.base_attention import NAME
from infini_retrofit.model.families import EXPORTED, FAMILIES
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
        _register_lora_targets(config.model_type)

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


def _register_lora_targets(model_type: str) -> None:
    """Name the projections of a model type for LoRA, if peft is imported."""
    if (constants := sys.modules.get("peft.utils.constants")) is not None:
        known = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        of_base = known.get(model_type.removeprefix(EXPORTED), [])
        known[model_type] = sorted({"q_proj", "v_proj", *of_base})


@functools.cache
def model_class(family: str) -> type:
    """Return the class of a family's exported models: the base's own, with Infini layers."""
    base = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])

    def init(self: Any, **kwargs: Any) -> None:
        super(config, self).__init__(**kwargs)

    # The constructor that `transformers` generates would hide the arguments of `_InfiniConfig`.
    own = {"__module__": __name__, "model_type": EXPORTED + family, "__init__": init}
    name, parents = f"Infini{base.config_class.__name__}", (_InfiniConfig, base.config_class)
    config = type(name, parents, own)
    own = {"__module__": __name__, "config_class": config}
    return type(f"Infini{base.__name__}", (_InfiniModel, base), own)


def body_name(model: str) -> str:
    """Return the name of the class that opens the body of a model class."""
    return model.replace("ForCausalLM", "Model")


class _Body:
    """Opens as the model without its head: the entry of `AutoModel`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """Open the model, and return its body."""
        return super().from_pretrained(*args, **options).base_model


def __getattr__(name: str) -> type:
    """Return a class by the name that config.json of an exported folder gives it."""
    for family in FAMILIES:
        model = f"Infini{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]}"
        if name == model:
            return model_class(family)
        if name == f"Infini{CONFIG_MAPPING_NAMES[family]}":
            return model_class(family).config_class
        if name == body_name(model):
            return type(name, (_Body, model_class(family)), {"__module__": __name__})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
