"""The seeds' setting from the Hub: from its cache, from a server, and with every fault of both."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tokenizers import Tokenizer

from infini_retrofit.bases.sources import BASE_KINDS, HubBase
from infini_retrofit.model.base import load_base
from infini_retrofit.pipeline import guard
from infini_retrofit.pipeline.params import load_presets
from infini_retrofit.texts.articles import fetch_parquet
from infini_retrofit.texts.corpora import CORPORA
from infini_retrofit.texts.splits import SPLITS, read_articles
from tests.tiny import assert_same_model, random_ids, tiny_base_folder
from tests.tiny_hub import NUM_ARTICLES, UNWANTED, pythia, repositories, serve
from tests.tiny_project import ROOT, contents, run_stage, write_params

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SEEDS = {"model": "pythia-70m", "corpus": "wikitext-2"}
STAGES = ("prepare_base", "prepare_wikitext")
REPOSITORIES = repositories()
MODEL = "^EleutherAI/pythia-70m at a39f36b.* cannot be downloaded: "
TEXT = "^Salesforce/wikitext at b08601e.* cannot be downloaded: "
NO_NETWORK = "; check repo_id, .* or use `{}`, which needs no network$"
MODEL_DEFAULT = NO_NETWORK.format("model: smollm2-135m")
TEXT_DEFAULT = NO_NETWORK.format("corpus: wikipedia-sample")
FAULTS = [
    ("base", "forbidden", "tree", MODEL + "401 .* Repository Not Found .*" + MODEL_DEFAULT),
    ("base", "portal", "tree", MODEL + "Expecting value: .*connection and proxy"),
    ("base", "other", "config.json", r"/config\.json must have the hash [0-9a-f]{40} of"),
    ("wikitext", "old", "tree", TEXT + "404 .* Revision Not Found .*" + TEXT_DEFAULT),
]


@pytest.fixture(scope="module")
def readers() -> dict[str, Callable[[], object]]:
    """Return the functions of the stages that read from the Hub."""
    base = load_presets(BASE_KINDS, "models", ROOT / "params.yaml")["pythia-70m"]
    corpora = load_presets(CORPORA, "corpora", ROOT / "params.yaml")
    return {"base": base.load, "wikitext": partial(fetch_parquet, corpora["wikitext-2"])}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub's files."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before a request is repeated
    return tmp_path / "cache"


@pytest.fixture
def hub(cache, monkeypatch):
    """A server instead of the Hub."""
    with serve(REPOSITORIES) as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project of the seeds' presets with an earlier result."""
    folder = tmp_path / "project"
    for name in ("models/base", "data/wikitext"):
        (folder / name).mkdir(parents=True)
        (folder / name / "old").write_text("of an earlier run")
    write_params(folder, SEEDS)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return folder


def error_of(stage: str) -> str:
    """Run a stage as the command line does, and return the sentence of its failure."""
    with pytest.raises(SystemExit) as caught:
        guard.run_stage(lambda: run_stage(stage))
    assert re.fullmatch("error: .*", caught.value.code)  # the exit code is then 1
    return caught.value.code


def assert_results(folder: Path) -> None:
    """Compare the results of the stages with the repositories."""
    base, want = load_base(folder / "models/base", torch.float32), pythia()
    ids = random_ids(want.config.vocab_size, 2, 11)
    torch.testing.assert_close(base(ids).logits, want(ids).logits)
    about = json.loads((folder / "models/base/base.json").read_text())
    assert about["note"] == "float16 weights, kept as float32"
    assert REPOSITORIES[0].revision in about["source"]
    tokenizer = Tokenizer.from_str(REPOSITORIES[0].files["tokenizer.json"].decode())
    saved = Tokenizer.from_file(str(folder / "models/base/tokenizer.json"))
    text = "cafe\u0301    12  dogs\n\n the end"
    assert saved.encode(text).ids == tokenizer.encode(text).ids
    of_split = {split: read_articles(folder / "data/wikitext", split) for split in SPLITS}
    articles = {article.title: article for split in SPLITS for article in of_split[split]}
    assert set(articles) == {f"The town {i}" for i in range(NUM_ARTICLES)}
    assert articles["The town 5"].text.startswith("The town 5\n\nThe town 5 had 0,000 dogs.\n")


def test_the_stages_download_only_what_they_read_and_then_need_no_network(
    hub, project, monkeypatch
):
    for stage in STAGES:
        run_stage(stage)
    assert_results(project)
    unwanted = [n for repo in REPOSITORIES for n, c in repo.files.items() if c == UNWANTED]
    assert len(unwanted) == 2
    fetched = {request.rpartition("/")[2] for request in hub.asked if request.startswith("GET /")}
    assert {"config.json", "tokenizer.json"} <= fetched
    assert not fetched & {Path(name).name for name in (*unwanted, "README.md")}
    first, requests = contents(project), list(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for stage in STAGES:
        run_stage(stage)
    assert contents(project) == first
    assert hub.asked == requests


@pytest.mark.parametrize(
    ("reader", "fault", "where", "message"), FAULTS, ids=["-".join(row[:3]) for row in FAULTS]
)
def test_a_fault_is_named(hub, readers, reader, fault, where, message):
    hub.fault, hub.where = fault, where
    with pytest.raises((ValueError, ConnectionError)) as error:
        readers[reader]()
    assert re.search(message, " ".join(str(error.value).split()))


def test_a_fault_ends_the_stage_in_one_sentence_and_the_earlier_result_stays(hub, project):
    before, top = contents(project), list(Path("models").iterdir())
    hub.fault, hub.where = "cut", "GET /large"
    error_of("prepare_base")
    hub.fault = "other"
    error = error_of("prepare_base")
    assert contents(project) == before
    assert list(Path("models").iterdir()) == top
    hub.fault = ""  # the wrong file is kept, so it is refused until it is deleted
    assert error_of("prepare_base") == error
    Path(re.search(r"delete (\S+) and run this again$", error).group(1)).unlink()
    run_stage("prepare_base")
    assert_same_model(project / "models/base", pythia())


def test_a_file_missing_from_the_cache_is_noticed_by_the_list_of_files_or_a_note_is_printed(
    hub, cache, readers, monkeypatch, capsys
):
    readers["wikitext"]()
    assert "note:" not in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (lost,) = cache.rglob("validation*.parquet")
    lost.unlink()
    with pytest.raises(ConnectionError, match=TEXT + ".*HF_HUB_OFFLINE"):
        readers["wikitext"]()
    copied = cache.with_name("copied")
    shutil.copytree(cache, copied, symlinks=True, ignore=shutil.ignore_patterns("trees"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(copied))
    readers["wikitext"]()
    note = r"note: .* no list of the files of Salesforce/wikitext, .*: test-\S+, train-\S+\n$"
    assert re.search(note, capsys.readouterr().err)


@pytest.mark.usefixtures("cache")
def test_without_network_the_message_names_the_default(readers, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=f"{MODEL}.*refused.*{MODEL_DEFAULT}"):
        readers["base"]()


def test_a_cache_without_links_is_read_too_and_must_hold_safetensors(cache):
    snapshot = cache / "models--org--name/snapshots" / COMMIT  # as on systems without links
    tiny_base_folder(snapshot)
    assert_same_model(snapshot, HubBase(repo_id="org/name", revision=COMMIT).load().model)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"org/name .* holds no model\*\.safetensors"):
        HubBase(repo_id="org/name", revision=COMMIT).load()
