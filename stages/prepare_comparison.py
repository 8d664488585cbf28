"""Stage `prepare_comparison`: what the retrofit is compared with, without what that ignores.

Forms that differ in their memory alone have one control, and those of equal bytes one rival of the
base: DVC runs what depends on these files once for all of them.

Reads:  params.yaml (infini, finetune, finetune_control), models/base
Writes: data/control.json, data/rival.json
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infini_retrofit.base import load_weightless
from infini_retrofit.evaluation import rival_of
from infini_retrofit.finetuning import ControlParams, FinetuneParams, plan_control
from infini_retrofit.infini_params import InfiniParams
from infini_retrofit.params import load_section
from infini_retrofit.pipeline import run_stage
from infini_retrofit.report import write_text
from infini_retrofit.retrofit import check_form

BASE = Path("models/base")
CONTROL, RIVAL = Path("data/control.json"), Path("data/rival.json")


def main() -> None:
    """Run the stage."""
    infini = load_section(InfiniParams, "infini")
    params = load_section(FinetuneParams, "finetune")
    own = load_section(ControlParams, "finetune_control")
    model = load_weightless(BASE)
    check_form(infini, model.config)
    write(CONTROL, plan_control(infini, params, own, model.config.num_hidden_layers))
    write(RIVAL, rival_of(model, infini))


def write(path: Path, values: Any) -> None:
    """Write a dataclass as JSON."""
    write_text(path, json.dumps(asdict(values), indent=2) + "\n")


if __name__ == "__main__":
    run_stage(main)
