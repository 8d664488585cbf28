"""What the Hub may do to a stage: refuse, fail, cut, mix up a file; one sentence, no leftovers."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from infini_retrofit.base import load_base, write_base
from infini_retrofit.base_sources import HubBase
from infini_retrofit.pipeline import run_stage
from tests.tiny import FAMILIES, assert_same_model, tiny_base_folder, tiny_tokenizer
from tests.tiny_hub import Repository, pythia, repositories
from tests.tiny_hub_server import serve
from tests.tiny_project import contents, write_params

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
    ("prepare_base", "forbidden", "tree", "name a model .* open to you, got 'EleutherAI/.* at a39"),
    ("prepare_base", "old", "tree", "name a model .* open to you, got 'EleutherAI/.* at a39f36b"),
    ("prepare_base", "broken", "tree", MODEL + BROKEN),
    ("prepare_base", "broken", "HEAD", MODEL + BROKEN),
    ("prepare_base", "broken", "GET /large", MODEL + BROKEN),
    ("prepare_base", "gone", "/tokenizer.json", MODEL + LOST + "the Hugging Face Hub answered 404"),
    ("prepare_base", "portal", "tree", MODEL + PROXY),
    ("prepare_base", "portal", "HEAD", MODEL + PROXY),
    ("prepare_base", "cut", "GET", MODEL + CUT),
    ("prepare_base", "cut", "GET /large", MODEL + CUT),
    ("prepare_base", "other", "config.json", r"/config\.json must have the hash [0-9a-f]{40}, as"),
    ("prepare_base", "other", "large", r"model\.safetensors must have the hash [0-9a-f]{64}, as"),
    ("prepare_wikitext", "old", "tree", "name a dataset .* open to you, got 'Salesforce/wikitext'"),
    ("prepare_wikitext", "broken", "GET /large", TEXT + BROKEN + ".*" + TEXT_DEFAULT),
    ("prepare_wikitext", "cut", "GET /large", TEXT + CUT + TEXT_DEFAULT),
    ("prepare_wikitext", "other", "large", r"\.parquet must have the hash [0-9a-f]{64}, as"),
    ("prepare_longdocs", "gone", "HEAD", BOOKS + LOST + "the Hugging Face Hub answered 404"),
    ("prepare_longdocs", "cut", "GET /large", BOOKS + CUT + TEXT_DEFAULT),
    ("prepare_longdocs", "other", "large", r"\.parquet must have the hash [0-9a-f]{64}, as"),
]


@pytest.fixture(scope="module")
def hub_files() -> list[Repository]:
    return repositories()


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project of the seeds' presets with an earlier result and an empty cache."""
    folder = tmp_path / "project"
    for name in ("models/base", "data/wikitext", "data/longdocs"):
        (folder / name).mkdir(parents=True)
        (folder / name / "old").write_text("of an earlier run")
    write_params(folder, SEEDS)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def hub(project, hub_files, monkeypatch):
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
    ("stage", "fault", "where", "message"), FAULTS, ids=["-".join(row[:3]) for row in FAULTS]
)
def test_a_fault_is_one_sentence_and_the_earlier_result_stays(
    hub, project, stage, fault, where, message
):
    if stage != "prepare_base":
        tiny_tokenizer().backend_tokenizer.save("models/base/tokenizer.json")
    if stage == "prepare_longdocs":
        run("prepare_wikitext")
    before, top = contents(project), list(Path("models").iterdir())
    hub.fault, hub.where = fault, where
    assert re.search(message, error_of(stage))
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


def test_what_is_in_the_cache_is_not_asked_for_again_and_survives_a_broken_hub(hub, project):
    run("prepare_base")
    fetched = list(hub.asked)
    assert fetched
    hub.fault = "broken"
    run("prepare_base")
    assert hub.asked == fetched
    assert_same_model(project / "models/base", pythia())


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device"), r"^error: \[Errno 28\] No space left on device$"),
        (RuntimeError("Task error:\n no"), LOST + r"fetching it .* failed \(Task error: no\); the"),
    ],
    ids=["disk", "hf_xet"],
)
def test_what_comes_from_elsewhere_is_told_as_what_it_is(project, monkeypatch, error, sentence):
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("infini_retrofit.hub.snapshot_download", download)
    assert re.search(sentence, error_of("prepare_base"))


@pytest.mark.parametrize("offline", [True, False])
def test_no_network_names_the_default_that_needs_none(project, monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    why = "HF_HUB_OFFLINE forbids to fetch it" if offline else "the connection to .* refused"
    assert re.search(f"{LOST}{why}.*smollm2-135m`\\) needs no network$", error_of("prepare_base"))


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
