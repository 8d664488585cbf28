"""What is recorded of a model counts for this very model only, told by DVC's own hashes."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from infini_retrofit.share.record import TRAINING, Record, dvc_md5, read_record
from tests.tiny_checkout import keep_settings_apart
from tests.tiny_project import ROOT

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
RESULTS = {
    "eval_sliding": {
        "base": {"segment_test_ppl": 1234.5},
        "finetuned": {"segment_test_ppl": 20.25, "state_bytes": 49920},
    },
    "finetune": {"val_loss": 3.25},
}
SETTINGS = {
    "prepare_wikitext": {"corpus": "c", "corpora.c": {"path": "/a/b"}},
    "finetune": {"finetune": {"lr": 0.0002}, "infini": {}},
}
MODEL, METRICS, LOCK = Path("models/finetuned"), Path("metrics"), Path("dvc.lock")
# Writes what a stage would, below a folder of the model and in a hidden file as well.
STAGE = """
from pathlib import Path
for name in ("b.json", "A.txt", ".hidden", "a/c.bin", "a.b"):
    path = Path("models/finetuned") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("what " + name + " holds" + chr(13) + chr(10))
"""


def write_record(folder: Path) -> None:
    """Write results of a model in `folder`, and the dvc.lock of the pipeline that made both."""
    (folder / METRICS).mkdir()
    entries = [{"path": str(MODEL), "md5": dvc_md5(folder / MODEL)}]
    for name, results in RESULTS.items():
        text = json.dumps(results)
        (folder / METRICS / f"{name}.json").write_text(text)
        md5 = hashlib.md5(text.encode()).hexdigest()
        entries.append({"path": f"metrics/{name}.json", "md5": md5})
    stages = {name: {"params": {"params.yaml": given}} for name, given in SETTINGS.items()}
    stages["finetune"]["outs"] = entries
    stages["eval_sliding"] = {"deps": entries[:1]}
    (folder / LOCK).write_text(yaml.safe_dump({"stages": stages}))


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and what was recorded of it, in the working folder."""
    monkeypatch.chdir(tmp_path)
    MODEL.mkdir(parents=True)
    (MODEL / "weights").write_text("some")
    write_record(tmp_path)


def test_a_folder_s_hash_is_the_one_that_dvc_writes(tmp_path, monkeypatch):
    keep_settings_apart(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("stage.py").write_text(STAGE)
    stage = {"cmd": f"{sys.executable} stage.py", "outs": [str(MODEL)]}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"finetune": stage}}))
    for command in (["init", "--no-scm", "--quiet"], ["repro", "--quiet"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], check=True)
    assert read_record(MODEL, METRICS, LOCK).doubts == (
        "there are no results of a model named finetuned: the card has none",
    )
    (MODEL / "a" / "c.bin").write_text("something else")
    assert "is not the models/finetuned" in " ".join(read_record(MODEL, METRICS, LOCK).doubts)


@pytest.mark.usefixtures("recorded")
def test_results_and_settings_of_this_model_are_used():
    record = read_record(MODEL, METRICS, LOCK)
    assert record.metrics == RESULTS
    assert record.training == {
        "prepare_wikitext": {"corpus": "c", "corpora.c": {"path": "b"}},
        "finetune": {"finetune": {"lr": 0.0002}},
    }
    assert not record.doubts


def change_model() -> None:
    (MODEL / "weights").write_text("others")


def add_to_model() -> None:
    (MODEL / "more").write_text("")


def score_another() -> None:
    lock = yaml.safe_load(LOCK.read_text())
    lock["stages"]["eval_sliding"]["deps"] = [{"path": str(MODEL), "md5": "0.dir"}]
    LOCK.write_text(yaml.safe_dump(lock))


@pytest.mark.parametrize("model", TRAINING)
def test_every_stage_that_a_card_names_records_what_it_ran_with(model):
    for stage in TRAINING[model]:
        assert PIPELINE[stage]["params"], stage


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("change", [change_model, add_to_model, score_another])
def test_nothing_is_used_of_a_model_that_is_another(change: Callable[[], None]):
    change()
    record = read_record(MODEL, METRICS, LOCK)
    assert (record.metrics, record.training) == ({}, {})
    (doubt,) = record.doubts
    assert "models/finetuned is not the models/finetuned of dvc.lock" in doubt


@pytest.mark.usefixtures("recorded")
def test_a_file_of_results_that_the_pipeline_did_not_write_is_left_out():
    (METRICS / "eval_sliding.json").write_text(json.dumps(RESULTS["eval_sliding"], indent=1))
    record = read_record(MODEL, METRICS, LOCK)
    assert not record.metrics
    assert set(record.training) == {"prepare_wikitext", "finetune"}
    assert record.doubts[0].startswith("metrics/eval_sliding.json is not the one of dvc.lock")
    (METRICS / "eval_sliding.json").write_text(json.dumps(RESULTS["eval_sliding"]))
    (METRICS / "mine.json").write_text("{}")
    assert read_record(MODEL, METRICS, LOCK).metrics == RESULTS


@pytest.mark.usefixtures("recorded")
def test_without_a_lock_results_go_by_name_and_that_is_said():
    LOCK.unlink()
    record = read_record(MODEL, METRICS, LOCK)
    assert (record.metrics, record.training) == (RESULTS, {})
    assert record.doubts[0].startswith("without dvc.lock nothing proves")
    renamed = shutil.copytree(MODEL, "models/mine")
    nothing = ("there are no results of a model named mine: the card has none",)
    assert read_record(Path(renamed), METRICS, LOCK) == Record(doubts=nothing)


@pytest.mark.usefixtures("recorded")
def test_a_lock_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"must name a dvc\.lock, got .*, which has no stages"):
        read_record(MODEL, METRICS, METRICS / "finetune.json")
