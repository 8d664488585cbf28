"""The seeds' setting without network: Pythia, WikiText-2 and PG-19 out of the Hub's own cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer

from infini_retrofit.model.base import load_base
from infini_retrofit.texts.splits import SPLITS, read_articles
from tests.tiny import random_ids
from tests.tiny_hub import (
    NUM_ARTICLES,
    UNWANTED,
    Repository,
    pythia,
    repositories,
    write_cache,
)
from tests.tiny_hub_server import serve
from tests.tiny_project import ROOT, write_params

TOKENS_PER_DOCUMENT, DOCUMENTS = 64, 5
SEEDS = {
    "model": "pythia-70m",
    "corpus": "wikitext-2",
    "longdocs.corpus": "pg19",
    "longdocs.tokens_per_document": TOKENS_PER_DOCUMENT,
    "longdocs.documents": DOCUMENTS,
}
STAGES = ("prepare_base", "prepare_wikitext", "prepare_longdocs")
PROGRAM = "\n".join(f"import stages.{stage} as s; s.main()" for stage in STAGES)


@pytest.fixture(scope="module")
def hub_files() -> list[Repository]:
    return repositories()


def run_stages(folder: Path, **settings: str) -> None:
    """Run the three stages as a user would, in a process of its own."""
    write_params(folder, SEEDS)
    env = os.environ | {"HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)} | settings
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def assert_results(folder: Path, hub_files: list[Repository]) -> None:
    """Compare what the stages wrote with what the repositories hold."""
    base, want = load_base(folder / "models/base", torch.float32), pythia()
    ids = random_ids(want.config.vocab_size, 2, 11)
    torch.testing.assert_close(base(ids).logits, want(ids).logits)
    about = json.loads((folder / "models/base/base.json").read_text())
    assert about["note"] == "float16 weights, kept as float32"
    assert hub_files[0].revision in about["source"]
    tokenizer = Tokenizer.from_str(hub_files[0].files["tokenizer.json"].decode())
    saved = Tokenizer.from_file(str(folder / "models/base/tokenizer.json"))
    text = "cafe\u0301    12  dogs\n\n the end"
    assert saved.encode(text).ids == tokenizer.encode(text).ids
    of_split = {split: read_articles(folder / "data/wikitext", split) for split in SPLITS}
    articles = {article.title: article for split in SPLITS for article in of_split[split]}
    assert set(articles) == {f"The town {i}" for i in range(NUM_ARTICLES)}
    assert articles["The town 5"].text.startswith("The town 5\n\nThe town 5 had 0,000 dogs.\n")
    for split in SPLITS:
        documents = pq.read_table(folder / f"data/longdocs/{split}.parquet").to_pylist()
        assert len(documents) == DOCUMENTS
        for document in documents:
            number = document["title"].removeprefix("The Sea, volume ")
            assert len(document["input_ids"]) == TOKENS_PER_DOCUMENT
            assert f" of {number}.\nChapter " in tokenizer.decode(document["input_ids"])


def test_the_three_stages_run_from_a_cache_folder(tmp_path, hub_files):
    write_cache(tmp_path / "hf/hub", hub_files)
    run_stages(tmp_path, HF_HUB_OFFLINE="1")
    assert_results(tmp_path, hub_files)


def test_the_three_stages_run_from_a_server_and_fetch_no_file_that_they_do_not_need(
    tmp_path, hub_files
):
    with serve(hub_files) as hub:
        run_stages(tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.endpoint)
    assert_results(tmp_path, hub_files)
    unwanted = [n for repo in hub_files for n, c in repo.files.items() if c == UNWANTED]
    assert len(unwanted) == 3
    fetched = {request.rpartition("/")[2] for request in hub.asked if request.startswith("GET /")}
    assert {"config.json", "tokenizer.json"} <= fetched
    assert not fetched & {Path(name).name for name in (*unwanted, "README.md")}
