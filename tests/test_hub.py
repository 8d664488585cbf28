"""What the Hub may do to a stage: refuse, fail, cut, mix up a file; one sentence, no leftovers."""

import re
import shutil
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from infini_retrofit.bases.folder import write_base
from infini_retrofit.bases.sources import BASE_KINDS, HubBase
from infini_retrofit.model.base import load_base
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import load_presets
from infini_retrofit.texts.articles import read_hub
from infini_retrofit.texts.corpora import CORPORA
from tests.tiny import FAMILIES, assert_same_model, tiny_base_folder, tiny_tokenizer
from tests.tiny_hub import Repository, pythia, repositories
from tests.tiny_hub_server import serve
from tests.tiny_project import ROOT, contents, write_params

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SEEDS = {
    "model": "pythia-70m",
    "corpus": "wikitext-2",
    "longdocs.corpus": "pg19",
    "longdocs.tokens_per_document": 64,
    "longdocs.documents": 5,
}
MODEL, TEXT, BOOKS = "EleutherAI/pythia-70m ", "Salesforce/wikitext ", "emozilla/pg19 "
LOST = "is not in the local cache and "
BROKEN = LOST + "the Hugging Face Hub answered 500 to http://"
CUT = LOST + r"the connection to the Hugging Face Hub failed \(peer closed .*\); the embedded "
PROXY = LOST + r"what answered is not the Hugging Face Hub: is a proxy in the way\?; the embedded "
TEXT_DEFAULT = r"default \(`corpus: wikipedia-sample`\) needs no network$"
FAULTS = [
    ("base", "forbidden", "tree", "name a model .* open to you, got 'EleutherAI/.* at a39"),
    ("base", "old", "tree", "name a model .* open to you, got 'EleutherAI/.* at a39f36b"),
    ("base", "broken", "tree", MODEL + BROKEN),
    ("base", "broken", "HEAD", MODEL + BROKEN),
    ("base", "broken", "GET /large", MODEL + BROKEN),
    ("base", "gone", "/tokenizer.json", MODEL + LOST + "the Hugging Face Hub answered 404"),
    ("base", "portal", "tree", MODEL + PROXY),
    ("base", "portal", "HEAD", MODEL + PROXY),
    ("base", "cut", "GET", MODEL + CUT),
    ("base", "cut", "GET /large", MODEL + CUT),
    ("base", "other", "config.json", r"/config\.json must have the hash [0-9a-f]{40}, as"),
    ("base", "other", "large", r"model\.safetensors must have the hash [0-9a-f]{64}, as"),
    ("wikitext", "old", "tree", "name a dataset .* open to you, got 'Salesforce/wikitext'"),
    ("wikitext", "broken", "GET /large", TEXT + BROKEN + ".*" + TEXT_DEFAULT),
    ("wikitext", "cut", "GET /large", TEXT + CUT + TEXT_DEFAULT),
    ("wikitext", "other", "large", r"\.parquet must have the hash [0-9a-f]{64}, as"),
    ("books", "gone", "HEAD", BOOKS + LOST + "the Hugging Face Hub answered 404"),
    ("books", "cut", "GET /large", BOOKS + CUT + TEXT_DEFAULT),
    ("books", "other", "large", r"\.parquet must have the hash [0-9a-f]{64}, as"),
]


@pytest.fixture(scope="module")
def hub_files() -> list[Repository]:
    return repositories()


@pytest.fixture(scope="module")
def readers() -> dict[str, Callable[[], object]]:
    """Return what asks for files of the Hub, as the stages call it."""
    base = load_presets(BASE_KINDS, "models", ROOT / "params.yaml")["pythia-70m"]
    corpora = load_presets(CORPORA, "corpora", ROOT / "params.yaml")
    wikitext, books = (partial(read_hub, corpora[name]) for name in ("wikitext-2", "pg19"))
    return {"base": base.load, "wikitext": wikitext, "books": books}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub's files."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def project(cache, tmp_path, monkeypatch) -> Path:
    """A project of the seeds' presets with an earlier result."""
    folder = tmp_path / "project"
    for name in ("models/base", "data/wikitext", "data/longdocs"):
        (folder / name).mkdir(parents=True)
        (folder / name / "old").write_text("of an earlier run")
    write_params(folder, SEEDS)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return folder


@pytest.fixture
def hub(cache, hub_files, monkeypatch):
    """A server instead of the Hub, and no pause before a request is repeated."""
    with serve(hub_files) as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield server


def error_of(stage: str) -> str:
    """Run a stage as the command line does, and return what it ends with."""
    with pytest.raises(SystemExit) as caught:
        run_stage(import_module(f"stages.{stage}").main)
    message = caught.value.code
    assert isinstance(message, str)  # the exit code is then 1
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def run(stage: str) -> None:
    import_module(f"stages.{stage}").main()


@pytest.mark.parametrize(
    ("reader", "fault", "where", "message"), FAULTS, ids=["-".join(row[:3]) for row in FAULTS]
)
def test_a_fault_is_told_as_what_it_is(hub, readers, reader, fault, where, message):
    hub.fault, hub.where = fault, where
    with pytest.raises((ValueError, ConnectionError)) as error:
        readers[reader]()
    assert re.search(message, " ".join(str(error.value).split()))


@pytest.mark.parametrize(
    ("stage", "fault"),
    [("prepare_base", "cut"), ("prepare_wikitext", "other"), ("prepare_longdocs", "cut")],
)
def test_a_stage_ends_in_one_sentence_and_the_earlier_result_stays(hub, project, stage, fault):
    if stage != "prepare_base":
        tiny_tokenizer().backend_tokenizer.save("models/base/tokenizer.json")
    if stage == "prepare_longdocs":
        run("prepare_wikitext")
    before, top = contents(project), list(Path("models").iterdir())
    hub.fault, hub.where = fault, "GET /large"
    error_of(stage)
    assert contents(project) == before
    assert list(Path("models").iterdir()) == top


def test_after_a_cut_download_the_same_command_ends_well(hub, project):
    hub.fault, hub.where = "cut", "GET /large"
    error_of("prepare_base")
    hub.fault = ""
    run("prepare_base")
    assert_same_model(project / "models/base", pythia())


def test_a_mixed_up_file_is_refused_until_it_is_deleted_and_then_fetched_anew(hub, project):
    hub.fault, hub.where = "other", "large"
    error = error_of("prepare_base")
    hub.fault = ""
    assert error_of("prepare_base") == error
    Path(re.search(r"delete (\S+) and run this again$", error).group(1)).unlink()
    run("prepare_base")
    assert_same_model(project / "models/base", pythia())


def test_what_is_in_the_cache_is_not_asked_for_again_and_survives_a_broken_hub(hub, readers):
    readers["base"]()
    fetched = list(hub.asked)
    assert fetched
    hub.fault = "broken"
    weights, want = readers["base"]().model.state_dict(), pythia().state_dict()
    assert hub.asked == fetched
    assert all(torch.equal(weights[name], x) for name, x in want.items())


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device"), r"^\[Errno 28\] No space left on device$"),
        (RuntimeError("Task error: no"), LOST + r"fetching it .* failed \(Task error: no\); the"),
    ],
    ids=["disk", "hf_xet"],
)
def test_what_comes_from_elsewhere_is_told_as_what_it_is(readers, monkeypatch, error, sentence):
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("infini_retrofit.texts.hub.snapshot_download", download)
    with pytest.raises(OSError, match=sentence):
        readers["base"]()


def test_a_file_that_is_lost_from_the_cache_is_noticed_by_its_list_or_said_not_to_be(
    hub, cache, readers, monkeypatch, capsys
):
    readers["wikitext"]()
    assert "note:" not in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (lost,) = cache.rglob("validation*.parquet")
    lost.unlink()
    with pytest.raises(ConnectionError, match=f"{TEXT}{LOST}HF_HUB_OFFLINE forbids"):
        readers["wikitext"]()
    copied = cache.with_name("copied")
    shutil.copytree(cache, copied, symlinks=True, ignore=shutil.ignore_patterns("trees"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(copied))
    readers["wikitext"]()
    said = r"note: .* no list of the files of Salesforce/wikitext, .*: test-\S+, train-\S+\n$"
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.usefixtures("cache")
def test_no_network_names_the_default_that_needs_none(readers, monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    why = "HF_HUB_OFFLINE forbids to fetch it" if offline else "the connection to .* refused"
    with pytest.raises(ConnectionError, match=rf"{LOST}{why}.*smollm2-135m`\) needs no network$"):
        readers["base"]()


def test_a_branch_is_no_revision():
    with pytest.raises(ValueError, match=r"revision must be a commit of 40 .* got 'main': copy"):
        HubBase(repo_id="org/name", revision="main")


def cached_repository(cache: Path, family: str) -> Path:
    """Write a snapshot without links, as systems have it that know none."""
    snapshot = cache / "models--org--name/snapshots" / COMMIT
    tiny_base_folder(snapshot, family)
    return snapshot


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_without_links_serves_as_well(project, family):
    snapshot = cached_repository(Path(constants.HF_HUB_CACHE), family)
    base = HubBase(repo_id="org/name", revision=COMMIT).load()
    write_base(base, "x", project / "models/base")
    assert_same_model(project / "models/base", load_base(snapshot, torch.float32))
    assert COMMIT in base.source


def test_a_repository_without_safetensors_is_refused(project):
    (cached_repository(Path(constants.HF_HUB_CACHE), "llama") / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"org/name .* holds no \*\.safetensors"):
        HubBase(repo_id="org/name", revision=COMMIT).load()
