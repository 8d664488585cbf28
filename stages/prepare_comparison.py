"""Stage `prepare_comparison`: plan the control and the rival.

Neither file holds a parameter that makes no difference to its model. So DVC runs one control for
all forms that differ only in their memory, and one rival for all forms of equal bytes.

Reads:  params.yaml (infini, finetune, finetune_control), models/base
Writes: data/control.json, data/rival.json
"""

from pathlib import Path

from infini_retrofit.evaluation.rival import rival_of
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.base import load_weightless
from infini_retrofit.pipeline.files import write_sealed
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import load_section
from infini_retrofit.training.control import ControlParams, plan_control
from infini_retrofit.training.finetuning import FinetuneParams

BASE = Path("models/base")
CONTROL, RIVAL = Path("data/control.json"), Path("data/rival.json")


def main() -> str:
    """Run the stage and return what it made."""
    infini = load_section(InfiniParams, "infini")
    params = load_section(FinetuneParams, "finetune")
    own = load_section(ControlParams, "finetune_control")
    model = load_weightless(BASE)
    control = plan_control(infini, params, own, model.config.num_hidden_layers)
    rival = rival_of(model, infini)
    write_sealed(CONTROL, control)
    write_sealed(RIVAL, rival)
    return (
        f"prepare_comparison: a control that trains {control.finetune.trainable}, "
        f"a rival that carries {rival.num_tokens} tokens"
    )


if __name__ == "__main__":
    run_stage(main)
