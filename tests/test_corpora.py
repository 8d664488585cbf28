"""Sections `corpora` and `longdocs`: what they refuse, and the presets of the seeds' texts."""

import json

import pytest

from infini_retrofit.pipeline.params import load_presets
from infini_retrofit.texts.corpora import CORPORA

SHARES = {"val_share": 0.2, "test_share": 0.3}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = {"source": "hub", "repo_id": "a/b", "revision": COMMIT, "files": "*.parquet"}
FILES = {"source": "files", "path": "x", **SHARES}
OWN = HUB | {"source": "hub-splits"}


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (FILES | {"val_share": 0.0}, r"^corpora\.mine\.val_share must be .* than 0, got 0\.0$"),
        (FILES | {"val_share": 0.5, "test_share": 0.5}, "must be below 1.*0.5"),
        (OWN | {"revision": ""}, "must be a commit of 40 .* got '': copy one from"),
        (OWN | SHARES, r"corpora\.mine\.val_share is unknown; .*test_share is unknown"),
        (HUB, r"corpora\.mine\.val_share is missing; .*test_share is missing"),
    ],
)
def test_a_bad_corpus_is_refused_by_name(tmp_path, corpus, message):
    def load(corpus: dict[str, object]) -> object:
        path = tmp_path / "params.yaml"
        path.write_text(json.dumps({"corpora": {"mine": corpus}}))
        return load_presets(CORPORA, "corpora", path)["mine"]

    assert load(FILES).test_share == SHARES["test_share"]
    assert load(OWN).revision == COMMIT
    with pytest.raises(ValueError, match=message):
        load(corpus)
