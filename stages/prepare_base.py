"""Stage `prepare_base`: bring the base model to disk once, in Hugging Face form.

Reads:  params.yaml (model, models)
Writes: models/base
"""

from pathlib import Path

from infini_retrofit.base import BASE_KINDS, bring_base
from infini_retrofit.params import load_choice, load_section
from infini_retrofit.pipeline import run_stage

BASE = Path("models/base")


def main() -> None:
    """Run the stage."""
    name = load_section(str, "model")
    params = load_choice(BASE_KINDS, "model", "models")
    bring_base(params, name, BASE)


if __name__ == "__main__":
    run_stage(main)
