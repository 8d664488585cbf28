"""Stage `check_params`: refuse bad parameters before any other stage's outputs are touched.

Reads:  params.yaml (all of it), what tells how deep the base is, models/base if it is there
Writes: data/params_ok
"""

import json
from pathlib import Path
from typing import NamedTuple

from infini_retrofit.bases.sources import BASE_KINDS, LocalBase
from infini_retrofit.evaluation.evaluation import EvalParams
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.checkpoints import check_layers
from infini_retrofit.model.retrofit import resolve_layers
from infini_retrofit.pipeline.files import write_text
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import load_choice, load_presets, load_section, read_params
from infini_retrofit.texts.corpora import CORPORA, SAME, LongdocsParams
from infini_retrofit.training.control import ControlParams
from infini_retrofit.training.distillation import DistillParams
from infini_retrofit.training.finetuning import FinetuneParams, check_trainable

PARAMS_OK, BASE = Path("data/params_ok"), Path("models/base")
PRESETS = {"model": ("models", BASE_KINDS), "corpus": ("corpora", CORPORA)}


class Sections(NamedTuple):
    """Every section that is no preset."""

    longdocs: LongdocsParams
    infini: InfiniParams
    distill: DistillParams
    finetune: FinetuneParams
    finetune_control: ControlParams
    eval: EvalParams


def main() -> None:
    """Run the stage."""
    check_top_level()
    check_launcher()
    check_presets()
    sections = Sections(
        longdocs=load_section(LongdocsParams, "longdocs"),
        infini=load_section(InfiniParams, "infini"),
        distill=load_section(DistillParams, "distill"),
        finetune=load_section(FinetuneParams, "finetune"),
        finetune_control=load_section(ControlParams, "finetune_control"),
        eval=load_section(EvalParams, "eval"),
    )
    if sections.longdocs.corpus != SAME:
        load_choice(CORPORA, "longdocs.corpus", "corpora")
    check_between(sections)
    check_base(sections.infini)
    write_text(PARAMS_OK, "params.yaml was checked\n")


def check_top_level() -> None:
    """Refuse a section or a single value that nothing reads, or that is missing."""
    known = {"launcher", *PRESETS, *(table for table, _ in PRESETS.values()), *Sections._fields}
    given = set(read_params())
    if given != known:
        raise ValueError(
            f"params.yaml must have exactly its own keys, "
            f"got unknown {sorted(map(str, given - known))}, missing {sorted(known - given)}"
        )


def check_launcher() -> None:
    """Refuse a launcher with which DVC would have nothing to start."""
    launcher = load_section(str, "launcher")
    if not launcher.strip():
        raise ValueError(f"launcher must be a command such as python, got {launcher!r}")


def check_presets() -> None:
    """Check every preset, chosen or not, and that the chosen ones exist."""
    for chooser, (table, kinds) in PRESETS.items():
        load_presets(kinds, table)
        load_choice(kinds, chooser, table)


def check_between(sections: Sections) -> None:
    """Check the rules between sections; those inside one stand with its dataclass."""
    segment_length = sections.infini.segment_length
    lengths = {
        "longdocs.tokens_per_document": sections.longdocs.tokens_per_document,
        "distill.tokens_per_sample": sections.distill.tokens_per_sample,
    }
    for name, length in lengths.items():
        if length % segment_length:
            raise ValueError(
                f"{name} must be a multiple of infini.segment_length ({segment_length} tokens), "
                f"got {length}"
            )
    if sections.longdocs.tokens_per_document == segment_length:
        raise ValueError(
            "longdocs.tokens_per_document must be at least 2 segments (infini.segment_length = "
            f"{segment_length} tokens), or nothing crosses a border, got {segment_length}"
        )
    check_trainable(sections.finetune.trainable, sections.infini)
    check_trainable(sections.finetune_control.trainable, sections.infini, "finetune_control")
    check_objective(sections.infini, sections.distill)


def check_objective(infini: InfiniParams, distill: DistillParams) -> None:
    """Refuse an objective that part of the layers could never reach."""
    if infini.whole_layers and distill.objective == "attention_output":
        raise ValueError(
            "distill.objective must be layer_output or logit_kl when infini.init is random_layer, "
            f"whose MLP would stay random, got {distill.objective}"
        )


def check_base(infini: InfiniParams) -> None:
    """Check the layers against the chosen base: its source, and what is on disk already.

    What is on disk under its name, but of another depth, is what `prepare_base` will replace.
    """
    depth = load_choice(BASE_KINDS, "model", "models").known_depth()
    if depth is not None:
        resolve_layers(infini.layers, depth)
    about = BASE / "base.json"
    if not about.is_file() or json.loads(about.read_text())["name"] != load_section(str, "model"):
        return
    if depth in (None, LocalBase(path=str(BASE)).known_depth()):
        check_layers(infini, BASE)


if __name__ == "__main__":
    run_stage(main)
