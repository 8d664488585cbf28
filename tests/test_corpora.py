"""Sections `corpora` and `longdocs`: what they refuse, and the presets of the seeds' texts."""

import json

import pytest

from infini_retrofit.pipeline.params import load_presets, load_section
from infini_retrofit.texts.corpora import CORPORA, HubSplits, LongdocsParams
from tests.tiny_project import ROOT

SHARES = {"val_share": 0.2, "test_share": 0.3}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = {"source": "hub", "repo_id": "a/b", "revision": COMMIT, "files": "*.parquet"}
OWN = HUB | {"source": "hub-splits"}
LONGDOCS = {"corpus": "same", "tokens_per_document": 8, "documents": "all"}


@pytest.fixture
def load(tmp_path):
    """Return a function that reads one corpus from a file of parameters."""

    def load(corpus):
        path = tmp_path / "params.yaml"
        path.write_text(json.dumps({"corpora": {"mine": corpus}}))
        return load_presets(CORPORA, "corpora", path)["mine"]

    return load


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (
            {"source": "gensim-sample", **SHARES, "val_share": 0.0},
            r"corpora\.mine\.val_share must be greater than 0, got 0\.0",
        ),
        (HUB | SHARES | {"test_share": 1.0}, r"mine\.test_share must be less than 1, got 1\.0"),
        (
            {"source": "files", "path": "x", "val_share": 0.5, "test_share": 0.5},
            "must be below 1.*0.5",
        ),
        (
            HUB | SHARES | {"revision": "main"},
            r"corpora\.mine\.revision: must be a commit of 40 .* got 'main': copy one from",
        ),
        (OWN | {"revision": ""}, "must be a commit of 40 .* got '': copy one from"),
        (OWN | SHARES, r"corpora\.mine\.val_share is unknown; .*test_share is unknown"),
        (HUB, r"corpora\.mine\.val_share is missing; .*test_share is missing"),
    ],
)
def test_a_bad_corpus_is_refused_by_name(load, corpus, message):
    with pytest.raises(ValueError, match=message):
        load(corpus)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_per_document": 1}, r"longdocs\.tokens_per_document must be .* to 2, got 1"),
        ({"documents": 1}, r"longdocs\.documents must be 'all' or .* to 2, got 1"),
    ],
)
def test_too_short_or_too_few_documents_are_refused_by_name(tmp_path, change, message):
    (tmp_path / "params.yaml").write_text(json.dumps({"longdocs": LONGDOCS | change}))
    with pytest.raises(ValueError, match=message):
        load_section(LongdocsParams, "longdocs", tmp_path / "params.yaml")


def test_what_is_good_is_accepted(load, tmp_path):
    assert load(HUB | SHARES).test_share == SHARES["test_share"]
    assert load(OWN).revision == COMMIT
    (tmp_path / "params.yaml").write_text(json.dumps({"longdocs": LONGDOCS | {"documents": 2}}))
    assert load_section(LongdocsParams, "longdocs", tmp_path / "params.yaml").documents == 2


def test_the_seeds_texts_are_presets_of_the_project():
    presets = load_presets(CORPORA, "corpora", ROOT / "params.yaml")
    assert type(presets["wikitext-2"]) is HubSplits
    assert presets["wikitext-2"].repo_id == "Salesforce/wikitext"
    assert presets["wikitext-2"].files == "wikitext-2-raw-v1/*.parquet"
    assert presets["pg19"].repo_id == "emozilla/pg19"
