"""Two processes under torchrun train as one does that has the whole batch.

One start of torchrun does for all of these tests; the last thing it does is to fail.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny_project
from tests.tiny_project import PUBLISHED, ROOT, STAGES, make_project, run_stage, write_params
from tests.tiny_project import SMALL as SMALL_PROJECT
from tests.tiny_training import finetuning
from tests.two_processes import TRAINING_STAGES, run_in_float32, take_steps

MODELS = {"distill": "distilled", "finetune": "finetuned", "finetune_control": "control"}
# 7 samples and 3 documents: at the end of an epoch one process has fewer rows, or none.
CHANGES = PUBLISHED | {
    "infini.layers": [0],
    "distill.samples": 7,
    "distill.epochs": 2,
    "finetune.train_documents": 3,
    "finetune.kl_weight": 0.5,
}
ONE, TWO = ({"distill.batch_size": 2 * n, "finetune.batch_size": n} for n in (2, 1))


Runs = tuple[Path, subprocess.CompletedProcess[str]]  # what the processes left, and said


def returned(runs: Runs, task: str) -> list:
    """Return what each process returned of a task."""
    return [torch.load(runs[0] / f"{task}-{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Train in two processes, and in one while they start."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "one").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_project, "TRAINING_STEPS", 10)  # what the base knows counts for nothing
        make_project(folder / "one", **CHANGES | ONE)
        patch.chdir(folder / "one")
        for stage in STAGES[: STAGES.index("baseline_eval")]:
            run_stage(stage)
        for name in ("two", "unweighted", "killed"):
            shutil.copytree(folder / "one", folder / name)
            write_params(folder / name, SMALL_PROJECT | CHANGES | TWO)
            patch.chdir(folder / name)
            run_stage("prepare_comparison")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.Popen(
        [*command, str(ROOT / "tests/two_processes.py"), str(folder)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with run:
        try:
            for stage in TRAINING_STAGES:
                run_in_float32(folder / "one", stage)
            said = run.communicate(timeout=300)
        finally:
            run.terminate()
    end = subprocess.CompletedProcess(run.args, run.returncode, *said)
    assert (folder / "shard-0.pt").exists(), end.stderr[-4000:]
    return folder, end


def losses(project: Path, stage: str) -> list[float]:
    with (project / f"plots/{stage}.tsv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file, delimiter="\t")]


def weights(project: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(project / "models" / MODELS[stage] / "retrofit.safetensors")


def assert_alike(project: Path, reference: Path, stage: str) -> None:
    assert losses(project, stage) == pytest.approx(losses(reference, stage), rel=1e-5)
    torch.testing.assert_close(
        weights(project, stage), weights(reference, stage), rtol=1e-5, atol=1e-6
    )
    files = [folder / f"metrics/{stage}.json" for folder in (project, reference)]
    metrics, expected = (json.loads(file.read_text()) for file in files)
    assert metrics == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stage", TRAINING_STAGES)
def test_two_processes_train_as_one_with_the_whole_batch(runs, stage):
    assert len(losses(runs[0] / "one", stage)) == 5
    assert_alike(runs[0] / "two", runs[0] / "one", stage)


def test_it_would_show_if_rows_weighed_unlike(runs):
    unweighted, expected = (losses(runs[0] / name, "distill") for name in ("unweighted", "one"))
    assert unweighted != pytest.approx(expected, rel=1e-4)


def test_a_process_that_fails_ends_all_with_one_sentence(runs):
    assert runs[1].returncode == 1
    (line,) = [line for line in runs[1].stderr.splitlines() if "error: " in line]
    assert line.endswith("error: the moon must be full, got half")
    assert runs[1].stderr.count("Traceback") <= 1  # torchrun's own


def test_a_run_of_two_processes_goes_on_where_it_was_killed(runs):
    steps_of_an_epoch = 2
    assert returned(runs, "resume") == [steps_of_an_epoch] * 2
    assert not list((runs[0] / "killed/checkpoints").iterdir())
    assert_alike(runs[0] / "killed", runs[0] / "two", "finetune")


def test_all_processes_stop_when_the_first_does(runs):
    results = returned(runs, "stop_early")
    assert results[0] == results[1]
    assert (results[0]["epochs_run"], results[0]["best_epoch"]) == (3, 1)
    rows = [row.split("\t") for row in (runs[0] / "early/history.tsv").read_text().splitlines()]
    assert [float(loss) for _, split, loss, _ in rows[1:] if split == "val"] == [9, 5, 6, 7]
    assert runs[1].stdout.count("stopped early after epoch 3, best 1\n") == 1
    assert "{" not in runs[1].stdout


def test_a_loss_that_one_process_lost_stops_all(runs):
    messages = returned(runs, "diverge")
    assert messages[0] == messages[1]
    assert messages[0].startswith("training diverged in epoch 1, step 1: the training loss is nan")


def test_a_sharded_model_takes_the_steps_of_a_whole_one(runs):
    task = finetuning(trainable="all")
    loss = take_steps(task)
    expected = {name: p.detach() for name, p in task.named_parameters()}
    for sharded_loss, sharded in returned(runs, "shard"):
        torch.testing.assert_close(sharded_loss, loss.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(sharded, expected, rtol=1e-5, atol=1e-6)
    start = {name: p.detach() for name, p in finetuning(trainable="all").named_parameters()}
    with pytest.raises(AssertionError):
        torch.testing.assert_close(start, expected, rtol=1e-3, atol=1e-4)
