"""The checker of continuous integration accepts what differs between machines, and no more."""

import copy
import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import yaml

SOURCE = Path(__file__).parent.parent / ".ci" / "check_metrics.py"
SPEC = importlib.util.spec_from_file_location("check_metrics", SOURCE)
check_metrics = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_metrics)

METRICS = {
    "finetuned": {"segment_test_ppl": 20.0, "t2_test_ppl": 900.0, "gap_recovered": 0.1},
    "state_bytes": 1024,
}
CODE = "x = 1\n"
LOCK = {
    "schema": "2.0",
    "stages": {
        "prepare_base": {
            "cmd": "python -m stages.prepare_base",
            "deps": [
                {"path": "stages/prepare_base.py", "md5": hashlib.md5(b"x = 1\n").hexdigest()}
            ],
            "params": {"params.yaml": {"model": "small", "models.small": {"path": "a"}}},
            "outs": [{"path": "models/base", "md5": "1.dir"}],
        },
        "distill": {
            "cmd": "python -m stages.distill",
            "deps": [{"path": "models/base", "md5": "1.dir"}],
            "params": {"params.yaml": {"distill": {"epochs": 3}}},
            "outs": [{"path": "models/distilled", "md5": "2.dir"}],
        },
    },
}
PARAMS = {"model": "small", "models": {"small": {"path": "a"}}, "distill": {"epochs": 3}}


def write(folder: Path, metrics: dict, lock: dict, params: dict = PARAMS) -> Path:
    (folder / "metrics").mkdir(parents=True)
    (folder / "stages").mkdir()
    (folder / "metrics" / "eval_sliding.json").write_text(json.dumps(metrics))
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock))
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "stages" / "prepare_base.py").write_text(CODE)
    return folder


def changed(tree: dict, path: str, value: object) -> dict:
    """Return a copy of a tree with one value set, or removed if it is None."""
    tree = copy.deepcopy(tree)
    *above, last = path.split("/")
    node = tree
    for key in above:
        node = node[int(key) if isinstance(node, list) else key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return tree


def metrics_faults(tmp_path: Path, now: dict) -> list[str]:
    folders = write(tmp_path / "committed", METRICS, LOCK), write(tmp_path / "now", now, LOCK)
    return list(check_metrics.metrics_faults(*folders))


def lock_faults(tmp_path: Path, now: dict, params: dict = PARAMS) -> list[str]:
    committed = write(tmp_path / "committed", METRICS, LOCK)
    return list(check_metrics.lock_faults(committed, write(tmp_path / "now", {}, now, params)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("finetuned/segment_test_ppl", 20.39),
        ("finetuned/segment_test_ppl", 19.61),
        ("finetuned/t2_test_ppl", 1349.0),
        ("finetuned/t2_test_ppl", 601.0),
        ("finetuned/gap_recovered", 0.1199),
        ("finetuned/gap_recovered", 0.0801),
        ("state_bytes", 1025),
    ],
)
def test_small_differences_pass(tmp_path, path, value):
    assert metrics_faults(tmp_path, changed(METRICS, path, value)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("finetuned/segment_test_ppl", 20.41),
        ("finetuned/segment_test_ppl", 19.59),
        ("finetuned/segment_test_ppl", -20.0),
        ("finetuned/segment_test_ppl", None),
        ("finetuned/segment_test_ppl", "20.0"),
        ("finetuned/t2_test_ppl", 1351.0),
        ("finetuned/t2_test_ppl", 599.0),
        ("finetuned/gap_recovered", 0.121),
        ("finetuned/gap_recovered", 0.079),
        ("finetuned/gap_recovered", float("nan")),
        ("state_bytes", float("inf")),
        ("state_bytes", None),
        ("new", 1.0),
    ],
)
def test_large_differences_are_named(tmp_path, path, value):
    (fault,) = metrics_faults(tmp_path, changed(METRICS, path, value))
    assert fault.startswith("eval_sliding.json." + path.replace("/", "."))


def test_a_missing_file_is_a_fault(tmp_path):
    folders = write(tmp_path / "committed", METRICS, LOCK), write(tmp_path / "now", METRICS, LOCK)
    (folders[1] / "metrics" / "eval_sliding.json").unlink()
    assert len(list(check_metrics.metrics_faults(*folders))) == 4
    (folders[0] / "metrics" / "eval_sliding.json").unlink()
    assert list(check_metrics.metrics_faults(*folders)) == ["metrics: none are committed"]


def test_trained_outputs_may_differ(tmp_path):
    assert lock_faults(tmp_path, changed(LOCK, "stages/distill/outs/0/md5", "3.dir")) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stages/prepare_base/outs/0/md5", "3.dir", "prepare_base: other outputs"),
        ("stages/distill/cmd", "torchrun -m stages.distill", "distill: the command was"),
        ("stages/distill/deps/0/path", "models/other", "distill: other dependencies"),
        ("stages/distill/params/params.yaml/infini", 1, "distill: other parameters: ['infini']"),
        ("stages/distill", None, "distill is no stage"),
        ("stages/finetune", {"cmd": ""}, "finetune is not committed"),
    ],
)
def test_another_pipeline_is_a_fault(tmp_path, path, value, message):
    (fault,) = lock_faults(tmp_path, changed(LOCK, path, value))
    assert fault.startswith(f"dvc.lock: {message}")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("distill/epochs", 4, "distill: distill was {'epochs': 3}, now {'epochs': 4}"),
        ("models/small/path", "b", "prepare_base: models.small was {'path': 'a'}, now"),
        ("model", None, "prepare_base: model was small, now None"),
    ],
)
def test_a_parameter_that_the_lock_does_not_have_is_a_fault(tmp_path, path, value, message):
    (fault,) = lock_faults(tmp_path, LOCK, changed(PARAMS, path, value))
    assert fault.startswith(f"dvc.lock: {message}")


def test_a_source_that_was_not_run_is_a_fault(tmp_path):
    committed, now = write(tmp_path / "a", METRICS, LOCK), write(tmp_path / "b", METRICS, LOCK)
    (now / "stages" / "prepare_base.py").write_text("x = 2\n")
    (fault,) = check_metrics.lock_faults(committed, now)
    assert fault == ("dvc.lock: prepare_base: stages/prepare_base.py is not the file that was run")


@pytest.mark.parametrize(("ppl", "code"), [(20.1, 0), (25.0, 1)])
def test_the_exit_code_tells_and_the_faults_stand_on_stderr(
    tmp_path, monkeypatch, capsys, ppl, code
):
    write(tmp_path / "a", METRICS, LOCK)
    write(tmp_path / "b", changed(METRICS, "finetuned/segment_test_ppl", ppl), LOCK)
    monkeypatch.setattr("sys.argv", ["check_metrics.py", str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(SystemExit) as caught:
        check_metrics.main()
    assert caught.value.code == code
    assert ("committed 20.0, now 25.0" in capsys.readouterr().err) == bool(code)
