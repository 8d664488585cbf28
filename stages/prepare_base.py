"""Stage `prepare_base`: bring the base model to disk once, in Hugging Face form.

Reads:  params.yaml (model, models; for a base trained from scratch corpus, corpora)
Writes: models/base
"""

from pathlib import Path

from infini_retrofit.base_sources import BASE_KINDS, bring_base
from infini_retrofit.corpora import CORPORA
from infini_retrofit.imports import first_party_files
from infini_retrofit.params import load_choice, load_section, read_params
from infini_retrofit.pipeline import run_stage, unchanged

BASE = Path("models/base")


def main() -> None:
    """Run the stage."""
    name, corpus_name = load_section(str, "model"), load_section(str, "corpus")
    params = load_choice(BASE_KINDS, "model", "models")
    corpus = load_choice(CORPORA, "corpus", "corpora")
    table = read_params()
    presets = {
        f"models.{name}": table["models"][name],
        f"corpora.{corpus_name}": table["corpora"][corpus_name],
    }
    with unchanged("prepare_base", presets, first_party_files(Path(__file__))):
        bring_base(params, name, BASE, corpus_name, corpus)


if __name__ == "__main__":
    run_stage(main)
