"""Sections `corpora` and `longdocs`: what they refuse, and the presets of the seeds' texts."""

import pytest

from infini_retrofit.pipeline.params import load_presets
from infini_retrofit.texts.corpora import (
    CORPORA,
    FilesCorpus,
    GensimCorpus,
    HubCorpus,
    LongdocsParams,
)
from tests.tiny_project import ROOT

SHARES = {"val_share": 0.2, "test_share": 0.3}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub(**over):
    return HubCorpus(**{"repo_id": "a/b", "revision": COMMIT, "files": "*.parquet"} | SHARES | over)


def longdocs(**over):
    return LongdocsParams(**{"corpus": "same", "tokens_per_document": 8, "documents": "all"} | over)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GensimCorpus(val_share=0.0, test_share=0.1), "val_share must be .* got 0.0"),
        (lambda: GensimCorpus(val_share=0.1, test_share=1.0), "test_share must be .* got 1.0"),
        (lambda: FilesCorpus(path="x", val_share=0.5, test_share=0.5), "must be below 1.*0.5"),
        (
            lambda: hub(revision="main"),
            r"corpora\.<preset>\.revision must be a commit of 40 .* got 'main': copy one from",
        ),
        (lambda: hub(revision=""), "must be a commit of 40 .* got '': copy one from"),
        (lambda: hub(files="raw"), r"files must be a pattern for \*\.parquet .* got 'raw'"),
        (lambda: longdocs(tokens_per_document=1), "tokens_per_document must be .* got 1"),
        (lambda: longdocs(documents=1), r"longdocs\.documents must be all or at least 2 .* got 1"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_good_is_accepted():
    assert hub().revision == COMMIT
    assert longdocs(documents=2).documents == 2


def test_the_seeds_texts_are_presets_of_the_project():
    presets = load_presets(CORPORA, "corpora", ROOT / "params.yaml")
    assert presets["wikitext-2"].repo_id == "Salesforce/wikitext"
    assert presets["wikitext-2"].files == "wikitext-2-raw-v1/*.parquet"
    assert presets["pg19"].repo_id == "emozilla/pg19"
