"""Export a retrofitted model: the command, and the results that DVC vouches for.

`python -m infini_retrofit.share.export models/finetuned OUT` writes weights, tokenizer, modelling
code and a model card. `AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)` opens it.
`--push ORG/NAME` uploads it to the Hugging Face Hub as well.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from infini_retrofit.pipeline.files import read_json
from infini_retrofit.pipeline.guard import run_stage

MODELS, LOCK, RESULTS = Path("models"), Path("dvc.lock"), Path("metrics/eval_sliding.json")
# Stages whose parameters say how a model was trained, by the name of the model's folder.
_TEXTS = ("prepare_wikitext", "prepare_longdocs")
TRAINING = {
    "distilled": (*_TEXTS, "distill"),
    "finetuned": (*_TEXTS, "distill", "finetune"),
    "control": (*_TEXTS, "prepare_comparison"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        "python -m infini_retrofit.share.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="a retrofitted model, such as models/finetuned")
    add("out", type=Path, help="the folder to make")
    add("--base", type=Path, default=MODELS / "base", help="its base (default: %(default)s)")
    add("--license", help="of the weights, as the Hugging Face Hub names it")
    add("--base-model", help="the base's name on the Hugging Face Hub")
    add("--other-layers", choices=["segment", "full"], help="default: as the model says")
    add("--push", metavar="ORG/NAME", help="upload it to this model on the Hugging Face Hub")
    given = parser.parse_args(arguments)
    # All import torch, which takes seconds. Wrong arguments were refused before.
    from infini_retrofit.share.card import About
    from infini_retrofit.share.exported_folder import check_new, export_model
    from infini_retrofit.share.push import open_repository, push

    check_new(given.out)
    if given.push:
        open_repository(given.push)
    is_recorded = dvc_vouches_for(given.folder)
    about = About(
        metrics=read_json(RESULTS, dict) if is_recorded else {},
        training=recorded_params(given.folder.name) if is_recorded else {},
        license=given.license,
        base_model=given.base_model,
    )
    export_model(given.base, given.folder, given.out, about, given.other_layers)
    if not is_recorded:
        print(
            f"note: the card shows no results and no training parameters, because {LOCK} and "
            f"{RESULTS} of the working folder do not belong to this {given.folder}",
            file=sys.stderr,
        )
    opened = f'AutoModelForCausalLM.from_pretrained("{given.out}", trust_remote_code=True)'
    print(f"wrote {given.out}; open it by {opened}")
    if given.push:
        print(f"pushed to {push(given.out, given.push)}")


def dvc_vouches_for(folder: Path) -> bool:
    """Return whether dvc.lock and the results of the working folder are of this very model.

    DVC itself compares: no model and no file of metrics may differ from what dvc.lock says.
    """
    is_of_pipeline = folder.resolve().parent == MODELS.resolve() and folder.name in TRAINING
    if not (is_of_pipeline and LOCK.is_file() and RESULTS.is_file()):
        return False
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    status = subprocess.run(command, capture_output=True, text=True)
    differs = re.search(rf'"({MODELS}|{RESULTS.parent})/', status.stdout)
    return status.returncode == 0 and not differs


def recorded_params(model: str) -> dict[str, Any]:
    """Return the parameters that dvc.lock names for a model, by stage, without its form."""
    stages = yaml.safe_load(LOCK.read_text(encoding="utf-8"))["stages"]
    return {name: _for_others(stages[name]["params"]["params.yaml"]) for name in TRAINING[model]}


def _for_others(value: Any) -> Any:
    """Leave out the form, and shorten absolute paths to their last names."""
    if isinstance(value, dict):
        return {key: _for_others(item) for key, item in value.items() if key != "infini"}
    is_path = isinstance(value, str) and Path(value).is_absolute()
    return Path(value).name if is_path else value


def command() -> None:
    """Run the command `infini-export`."""
    run_stage(main)


if __name__ == "__main__":
    command()
