"""The seeds' setting from the Hub: from its cache, from a server, and with every fault of both."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from infini_retrofit.bases.sources import BASE_KINDS, HubBase
from infini_retrofit.model.base import load_base
from infini_retrofit.pipeline import guard
from infini_retrofit.pipeline.params import load_presets
from infini_retrofit.texts.articles import read_hub
from infini_retrofit.texts.corpora import CORPORA
from infini_retrofit.texts.splits import SPLITS, read_articles
from tests.tiny import assert_same_model, random_ids, tiny_base_folder, tiny_tokenizer
from tests.tiny_hub import NUM_ARTICLES, UNWANTED, pythia, repositories, serve, write_cache
from tests.tiny_project import ROOT, contents, run_stage, write_params

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKENS_PER_DOCUMENT, DOCUMENTS = 64, 5
SEEDS = {
    "model": "pythia-70m",
    "corpus": "wikitext-2",
    "longdocs.corpus": "pg19",
    "longdocs.tokens_per_document": TOKENS_PER_DOCUMENT,
    "longdocs.documents": DOCUMENTS,
}
STAGES = ("prepare_base", "prepare_wikitext", "prepare_longdocs")
REPOSITORIES = repositories()
MODEL = "^EleutherAI/pythia-70m at a39f36b.* cannot be downloaded: "
TEXT = "^Salesforce/wikitext at b08601e.* cannot be downloaded: "
NO_NETWORK = "; check repo_id, .* or use `{}`, which needs no network$"
MODEL_DEFAULT = NO_NETWORK.format("model: smollm2-135m")
TEXT_DEFAULT = NO_NETWORK.format("corpus: wikipedia-sample")
FAULTS = [
    ("base", "forbidden", "tree", MODEL + "401 .* Repository Not Found .*" + MODEL_DEFAULT),
    ("base", "broken", "GET /large", MODEL + "Server error '500 .* '\\S+/large/[0-9a-f]+'"),
    ("base", "portal", "tree", MODEL + "Expecting value: .*connection and proxy"),
    ("base", "portal", "HEAD", MODEL + ".* not seem to be served by a Hugging Face Hub endpoint"),
    ("base", "cut", "GET", MODEL + "peer closed connection .*" + MODEL_DEFAULT),
    ("base", "other", "config.json", r"/config\.json must have the hash [0-9a-f]{40} of"),
    ("base", "other", "large", r"model\.safetensors must have the hash [0-9a-f]{64} of"),
    ("wikitext", "old", "tree", TEXT + "404 .* Revision Not Found .*" + TEXT_DEFAULT),
]


@pytest.fixture(scope="module")
def readers() -> dict[str, Callable[[], object]]:
    """Return the functions of the stages that read from the Hub."""
    base = load_presets(BASE_KINDS, "models", ROOT / "params.yaml")["pythia-70m"]
    corpora = load_presets(CORPORA, "corpora", ROOT / "params.yaml")
    return {"base": base.load, "wikitext": partial(read_hub, corpora["wikitext-2"])}


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
    for name in ("models/base", "data/wikitext", "data/longdocs"):
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
    message = caught.value.code
    assert isinstance(message, str)  # the exit code is then 1
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def assert_same_weights(got: PreTrainedModel, want: PreTrainedModel) -> None:
    weights = got.state_dict()
    assert all(torch.equal(weights[name], x) for name, x in want.state_dict().items())


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
    for split in SPLITS:
        documents = pq.read_table(folder / f"data/longdocs/{split}.parquet").to_pylist()
        assert len(documents) == DOCUMENTS
        for document in documents:
            number = document["title"].removeprefix("The Sea, volume ")
            assert len(document["input_ids"]) == TOKENS_PER_DOCUMENT
            assert f" of {number}.\nChapter " in tokenizer.decode(document["input_ids"])


def test_the_stages_run_offline_from_a_cache_folder(tmp_path):
    write_cache(tmp_path / "hf/hub", REPOSITORIES)
    write_params(tmp_path, SEEDS)
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    program = "\n".join(f"import stages.{stage} as s; s.main()" for stage in STAGES)
    command = [sys.executable, "-c", program]
    stages = subprocess.run(command, cwd=tmp_path, env=os.environ | env, capture_output=True)
    assert stages.returncode == 0, stages.stderr.decode()
    assert_results(tmp_path)


def test_the_stages_run_from_a_server_and_download_only_what_they_read(hub, project):
    for stage in STAGES:
        run_stage(stage)
    assert_results(project)
    unwanted = [n for repo in REPOSITORIES for n, c in repo.files.items() if c == UNWANTED]
    assert len(unwanted) == 3
    fetched = {request.rpartition("/")[2] for request in hub.asked if request.startswith("GET /")}
    assert {"config.json", "tokenizer.json"} <= fetched
    assert not fetched & {Path(name).name for name in (*unwanted, "README.md")}


@pytest.mark.parametrize(
    ("reader", "fault", "where", "message"), FAULTS, ids=["-".join(row[:3]) for row in FAULTS]
)
def test_a_fault_is_named(hub, readers, reader, fault, where, message):
    hub.fault, hub.where = fault, where
    with pytest.raises((ValueError, ConnectionError)) as error:
        readers[reader]()
    assert re.search(message, " ".join(str(error.value).split()))


@pytest.mark.parametrize("stage", STAGES[:2])
def test_a_fault_ends_a_stage_in_one_sentence_and_the_earlier_result_stays(hub, project, stage):
    if stage != "prepare_base":
        tiny_tokenizer().backend_tokenizer.save("models/base/tokenizer.json")
    before, top = contents(project), list(Path("models").iterdir())
    hub.fault, hub.where = "cut", "GET /large"
    error_of(stage)
    assert contents(project) == before
    assert list(Path("models").iterdir()) == top
    hub.fault = ""  # then the same command succeeds
    run_stage(stage)
    assert contents(project) != before


def test_a_wrong_file_is_refused_until_it_is_deleted_and_then_downloaded_again(hub, project):
    hub.fault, hub.where = "other", "large"
    error = error_of("prepare_base")
    hub.fault = ""
    assert error_of("prepare_base") == error
    Path(re.search(r"delete (\S+) and run this again$", error).group(1)).unlink()
    run_stage("prepare_base")
    assert_same_model(project / "models/base", pythia())


def test_a_cached_file_is_not_requested_again_and_needs_no_hub(hub, readers):
    readers["base"]()
    requests = list(hub.asked)
    assert requests
    hub.fault = "broken"
    assert_same_weights(readers["base"]().model, pythia())
    assert hub.asked == requests


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device"), r"^\[Errno 28\] No space left on device$"),
        (RuntimeError("Task error: no"), MODEL + "Task error: no; check"),
    ],
    ids=["disk", "hf_xet"],
)
def test_an_error_of_the_disk_or_of_hf_xet_keeps_its_words(readers, monkeypatch, error, sentence):
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("infini_retrofit.texts.hub.snapshot_download", download)
    with pytest.raises(OSError, match=sentence):
        readers["base"]()


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


@pytest.mark.parametrize(("offline", "reason"), [(True, "HF_HUB_OFFLINE"), (False, "refused")])
@pytest.mark.usefixtures("cache")
def test_without_network_the_message_names_the_default(readers, monkeypatch, offline, reason):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=f"{MODEL}.*{reason}.*{MODEL_DEFAULT}"):
        readers["base"]()


def test_a_cache_without_links_is_read_too_and_must_hold_safetensors(cache):
    snapshot = cache / "models--org--name/snapshots" / COMMIT  # as on systems without links
    tiny_base_folder(snapshot)
    base = HubBase(repo_id="org/name", revision=COMMIT).load()
    assert_same_weights(base.model, load_base(snapshot, torch.float32))
    assert COMMIT in base.source
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"org/name .* holds no \*\.safetensors"):
        HubBase(repo_id="org/name", revision=COMMIT).load()
