"""Stage `prepare_base`: bring the base model to disk.

Reads:  params.yaml (model, models; corpus and corpora for a base trained from scratch)
Writes: models/base
"""

from pathlib import Path

from infini_retrofit.bases.sources import BASE_KINDS, bring_base, choose_base
from infini_retrofit.model.base import read_about
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import load_choice, load_presets, load_section
from infini_retrofit.texts.corpora import CORPORA

BASE = Path("models/base")


def main() -> str:
    """Run the stage and return what it made."""
    name, corpus_name = load_section(str, "model"), load_section(str, "corpus")
    params = choose_base(name, load_presets(BASE_KINDS, "models"))
    corpus = load_choice(CORPORA, "corpus", "corpora")
    bring_base(params, name, BASE, corpus_name, corpus)
    about = read_about(BASE)
    return f"prepare_base: {name}, {about.num_parameters:,} parameters; {about.note}"


if __name__ == "__main__":
    run_stage(main)
