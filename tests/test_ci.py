"""The check of metrics accepts differences between machines and refuses larger ones."""

import copy
import importlib.util
import json
import math
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("check_metrics", ROOT / ".ci" / "check_metrics.py")
check_metrics = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_metrics)

COMMITTED = check_metrics.read_metrics(ROOT)
LOCK = {
    "prepare_base": {
        "cmd": "python -m stages.prepare_base",
        "deps": [{"path": "stages/prepare_base.py", "md5": "1"}],
        "params": {"params.yaml": {"model": "small"}},
        "outs": [{"path": "models/base", "md5": "1.dir"}],
    },
    "distill": {
        "cmd": "python -m stages.distill",
        "deps": [
            {"path": "infini_retrofit/layer", "md5": "2.dir"},
            {"path": "models/base", "md5": "1.dir"},
        ],
        "params": {"params.yaml": {"distill": {"epochs": 3}}},
        "outs": [{"path": "models/distilled", "md5": "3.dir"}],
    },
    "eval_sliding": {
        "cmd": "python -m stages.eval_sliding",
        "deps": [{"path": "models/distilled", "md5": "3.dir"}],
        "outs": [{"path": "metrics/eval_sliding.json", "md5": "4"}],
    },
}


def write(folder: Path, metrics: dict, lock: dict) -> Path:
    (folder / "metrics").mkdir(parents=True)
    (folder / "metrics" / "eval_sliding.json").write_text(json.dumps(metrics))
    (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": lock}))
    return folder


def changed(tree: dict, path: str, value: object) -> dict:
    """Return a copy of a tree with one value set, or removed if it is None."""
    tree = copy.deepcopy(tree)
    *above, last = path.split("/")
    node = tree
    for key in above:
        node = node[int(key) if isinstance(node, list) else key]
    if value is None:
        node.pop(int(last) if isinstance(node, list) else last)
    else:
        node[last] = value
    return tree


def moved(name: str, difference: float) -> float:
    """Return a committed metric, moved by a difference as the checker counts it."""
    value = COMMITTED[name]
    return value * math.exp(difference) if name.endswith("_ppl") else value + difference


@pytest.mark.parametrize("name", COMMITTED)
def test_a_metric_may_differ_by_its_tolerance_and_no_more(name):
    value, allowed = COMMITTED[name], check_metrics.tolerance(name)
    last = name.split(".")[-1]
    counted = last.startswith(("num_", "state_bytes", "best_", "epochs_", "unigram"))
    assert (allowed == 0) is (counted and last != "num_key_tokens")
    for sign in (-1, 1):
        assert check_metrics.agree(name, value, moved(name, sign * 0.99 * allowed))
        wrong = sign * 1.01 * allowed or sign * 1e-6 * max(1, value)
        assert not check_metrics.agree(name, value, moved(name, wrong))


# What a metric would be in a broken run: another metric's value, or a number.
BROKEN = {
    "eval_sliding.base.full_test_ppl": "eval_sliding.base.t2_test_ppl",  # labels off by one
    "control_eval.segment_test_ppl": "baseline_eval.segment_test_ppl",  # nothing was trained
    "finetune_control.val_ppl": 8.34,  # nothing was trained
    "control_eval.full_test_ppl": "baseline_eval.full_test_ppl",
    "eval_sliding.finetuned.segment_test_ppl": "baseline_eval.segment_test_ppl",
    "finetune.val_ppl": 8.34,
    "distill.memory_share_p05": 0.3,  # the gates begin elsewhere
    "finetune.memory_share_mean": 0.5,  # the gates stand where they began
    "eval_sliding.finetuned.segment_swapped_test_ppl": "eval_sliding.finetuned.segment_test_ppl",
    "eval_sliding.finetuned.gain_over_off": 0.0,
    "eval_sliding.finetuned.gain_over_swapped": 0.0,
    "eval_sliding.finetuned.gain_over_control": 0.0,  # the control is the model itself
    "eval_sliding.finetuned.gap_recovered": 0.0,
    "finetune.best_epoch": 0,
    "eval_sliding.finetuned.state_bytes": 49921,
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_a_broken_run_would_measure_is_a_fault(name):
    wrong = COMMITTED.get(BROKEN[name], BROKEN[name])
    assert not check_metrics.agree(name, COMMITTED[name], wrong)


@pytest.mark.parametrize("value", [float("nan"), -20.0, "20.0", None])
def test_what_is_no_perplexity_is_a_fault(tmp_path, value):
    name, metrics = "finetuned/segment_test_ppl", {"finetuned": {"segment_test_ppl": 20.0}}
    now = write(tmp_path / "now", changed(metrics, name, value) | {"new": 1.0}, LOCK)
    faults = sorted(check_metrics.metrics_faults(write(tmp_path / "a", metrics, LOCK), now))
    assert len(faults) == 2
    assert faults[0].startswith("eval_sliding.finetuned.segment_test_ppl: ")
    assert faults[1] == "eval_sliding.new: not committed"


def test_a_missing_file_is_a_fault(tmp_path):
    folders = [write(tmp_path / name, {"a": 1, "b": 2}, LOCK) for name in ("committed", "now")]
    (folders[1] / "metrics" / "eval_sliding.json").unlink()
    assert len(list(check_metrics.metrics_faults(*folders))) == 2
    (folders[0] / "metrics" / "eval_sliding.json").unlink()
    assert list(check_metrics.metrics_faults(*folders)) == ["metrics: none are committed"]


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("prepare_base/outs/0/md5", "9.dir", "prepare_base: models/base was 1.dir, now 9.dir"),
        ("prepare_base/deps/0/md5", "9", "prepare_base: stages/prepare_base.py was 1, now 9"),
        ("distill/cmd", "torchrun", "distill: cmd was python -m stages.distill, now torchrun"),
        ("distill/params/params.yaml/distill/epochs", 4, "distill: parameter distill was {'ep"),
        ("finetune", {"cmd": "new"}, "finetune: cmd was absent, now new"),
        ("eval_sliding/outs", None, "eval_sliding: metrics/eval_sliding.json was trained, now"),
        # What is trained comes out differently elsewhere.
        ("distill/outs/0/md5", "9.dir", None),
        ("eval_sliding/deps/0/md5", "9.dir", None),
        ("eval_sliding/outs/0/md5", "9", None),
    ],
)
def test_a_lock_that_was_made_from_something_else_is_a_fault(tmp_path, path, value, fault):
    committed = write(tmp_path / "committed", {}, LOCK)
    now = write(tmp_path / "now", {}, changed(LOCK, path, value))
    faults = list(check_metrics.lock_faults(committed, now))
    assert len(faults) == (fault is not None)
    assert all(f.startswith(f"dvc.lock: {fault}") for f in faults)


@pytest.mark.parametrize(("value", "code"), [(20.0, 0), (25.0, 1)])
def test_the_exit_code_tells_and_the_faults_stand_on_stderr(
    tmp_path, monkeypatch, capsys, value, code
):
    folders = write(tmp_path / "a", {"a": 20.0}, LOCK), write(tmp_path / "b", {"a": value}, LOCK)
    monkeypatch.setattr("sys.argv", ["check_metrics.py", *map(str, folders)])
    with pytest.raises(SystemExit) as caught:
        check_metrics.main()
    assert caught.value.code == code
    assert ("eval_sliding.a: committed 20.0, now 25.0" in capsys.readouterr().err) == bool(code)
