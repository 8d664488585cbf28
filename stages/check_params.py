"""Stage `check_params`: check params.yaml before any other stage.

Reads:  params.yaml (all of it), the base's configuration if it is on disk
Writes: data/params_ok
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infini_retrofit.bases.sources import BASE_KINDS, choose_base
from infini_retrofit.evaluation.protocols import EvalParams
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.longcontext.params import LongcontextParams
from infini_retrofit.model.base import load_weightless, read_about
from infini_retrofit.model.retrofit import check_form, resolve_layers
from infini_retrofit.pipeline.fields import Launcher
from infini_retrofit.pipeline.files import write_text
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import load_choice, load_presets, load_section
from infini_retrofit.texts.corpora import CORPORA, SAME, LongdocsParams, PromptsCorpus
from infini_retrofit.training.control import ControlParams
from infini_retrofit.training.distillation import DistillParams
from infini_retrofit.training.finetuning import FinetuneParams

PARAMS_OK, BASE = Path("data/params_ok"), Path("models/base")


@dataclass(frozen=True, kw_only=True)
class Params:
    """The whole of params.yaml; each preset is checked as its source asks."""

    model: str
    corpus: str
    launcher: Launcher
    models: dict[str, dict[str, Any]]
    corpora: dict[str, dict[str, Any]]
    longdocs: LongdocsParams
    infini: InfiniParams
    distill: DistillParams
    finetune: FinetuneParams
    finetune_control: ControlParams
    eval: EvalParams
    longcontext: LongcontextParams


def main() -> str:
    """Run the stage and return what it made."""
    params = load_section(Params, "")
    model = choose_base(params.model, load_presets(BASE_KINDS, "models"))
    if isinstance(load_choice(CORPORA, "corpus", "corpora"), PromptsCorpus):
        raise ValueError(
            f"corpus must be a key of corpora that holds texts, got {params.corpus}, whose prompts "
            "are for longdocs.corpus"
        )
    if params.longdocs.corpus != SAME:
        load_choice(CORPORA, "longdocs.corpus", "corpora")
    check_between(params)
    check_base(params, model.known_depth())
    write_text(PARAMS_OK, "params.yaml was checked\n")
    return "check_params: every parameter is valid"


def check_between(params: Params) -> None:
    """Check the rules between sections; those inside one stand with its dataclass."""
    segment_length = params.infini.segment_length
    lengths = {
        "longdocs.tokens_per_document": params.longdocs.tokens_per_document,
        "distill.tokens_per_sample": params.distill.tokens_per_sample,
    }
    for name, length in lengths.items():
        if length % segment_length:
            raise ValueError(
                f"{name} must be a multiple of infini.segment_length ({segment_length} tokens), "
                f"got {length}"
            )
    if params.longdocs.tokens_per_document == segment_length:
        raise ValueError(
            "longdocs.tokens_per_document must be at least 2 segments (infini.segment_length = "
            f"{segment_length} tokens), or nothing crosses a border, got {segment_length}"
        )
    for section in ("finetune", "finetune_control"):
        trainable = getattr(params, section).trainable
        if params.infini.layers == [] and trainable in ("memory", "infini"):
            raise ValueError(
                f"{section}.trainable must be one of all, attention, lora when infini.layers is "
                f"[], where no Infini layer could train, got {trainable}"
            )
    if number := params.finetune.memory_documents:
        of_branch = params.infini.local == "none" and params.finetune.trainable == "infini"
        if not params.infini.has_memory or of_branch:
            raise ValueError(
                "finetune.memory_documents must be 0 where the memory is off, or all that trains, "
                f"got {number}"
            )
    check_objective(params.infini, params.distill)


def check_objective(infini: InfiniParams, distill: DistillParams) -> None:
    """Refuse an objective that part of the layers could never reach."""
    if infini.whole_layers and distill.objective == "attention_output":
        raise ValueError(
            "distill.objective must be layer_output when infini.init is random_layer, "
            f"whose MLP would stay random, got {distill.objective}"
        )
    if infini.insertion == "adapter" and distill.objective == "attention_output" and distill.epochs:
        raise ValueError(
            "distill.objective must be layer_output when infini.insertion is adapter, which "
            f"leaves the base's attention as it is, got {distill.objective}"
        )


def check_base(params: Params, depth: int | None) -> None:
    """Check that the chosen base has the layers, as far as it is known before it is on disk.

    A base on disk that is damaged, or has another name or depth, will be replaced by
    `prepare_base`.

    Args:
        params: the whole of params.yaml.
        depth: layers of the base by its preset; None where only its files tell.
    """
    if depth is not None:
        resolve_layers(params.infini.layers, depth)
    try:
        name, base = read_about(BASE).name, load_weightless(BASE)
    except (FileNotFoundError, ValueError):
        return
    if name == params.model and depth in (None, base.config.num_hidden_layers):
        check_form(params.infini, base)


if __name__ == "__main__":
    run_stage(main)
