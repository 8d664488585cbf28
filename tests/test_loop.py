"""Training on the Trainer: learning rates, stopping, resuming, and what a run leaves."""

import math
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from infini_retrofit.model.retrofit import infini_modules
from infini_retrofit.pipeline.files import MANIFEST
from infini_retrofit.training import loop
from infini_retrofit.training.finetuning import LrScale
from infini_retrofit.training.loop import rate_factor
from infini_retrofit.training.resuming import last_whole
from infini_retrofit.training.task import TrainingTask
from tests.tiny import random_ids
from tests.tiny_training import TOKENS, finetune_params, finetuning, run

STEPS = 4  # of an epoch


def rates_of(folder: Path, patch: pytest.MonkeyPatch, epochs: int) -> list[tuple[float, ...]]:
    """Train on 4 documents and return the rate of each step, by group."""
    rates, take = [], torch.optim.AdamW.step

    def spy(optimizer: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        rates.append([group["lr"] for group in optimizer.param_groups])
        return take(optimizer, *args, **kwargs)

    patch.setattr(torch.optim.AdamW, "step", spy)
    over = {"trainable": "attention", "lr_scale": LrScale(memory=3.0, infini=2.0, rest=1.0)}
    task = finetuning(form={"insertion": "parallel", "feature_map": "hedgehog"}, **over)
    patch.setattr(task, "validate", lambda val: {"val_loss": 1.0, "val_ppl": 2.0})
    run(task, folder, lr=1e-3, epochs=epochs, patience=epochs)
    return list(zip(*rates, strict=True))


def test_a_rate_of_a_group_of_its_own_spans_the_run(tmp_path, monkeypatch):
    rates = rates_of(tmp_path / "long", monkeypatch, epochs=9)
    assert rates[4] == pytest.approx([1e-3 * rate_factor(step, 36) for step in range(36)])
    gate, alpha, memory, infini, rest = map(sum, rates)
    assert gate == pytest.approx(loop.GATE_TRAVEL)
    assert alpha == pytest.approx(loop.ALPHA_TRAVEL)
    assert (memory / rest, infini / rest) == (pytest.approx(3), pytest.approx(2))
    # In a run of few steps, no step moves them far.
    gate, alpha, *_ = rates_of(tmp_path / "short", monkeypatch, epochs=1)
    rates = loop.MAX_GATE_RATE, loop.MAX_ALPHA_RATE
    assert (max(gate), max(alpha)) == pytest.approx(rates)
    assert sum(gate) < loop.GATE_TRAVEL
    assert sum(alpha) < loop.ALPHA_TRAVEL


@pytest.mark.parametrize("num_steps", [1, 8, 100])
def test_the_rate_ramps_up_from_the_first_step_on_and_falls_in_a_cosine(num_steps):
    factors = [rate_factor(step, num_steps) for step in range(num_steps)]
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert factors[peak] > 0.95
    assert peak <= 0.05 * num_steps
    assert min(factors) > 0
    assert num_steps == 1 or factors[-1] < 0.1


@pytest.mark.parametrize("trainable", ["infini", "lora"])
def test_a_killed_run_resumes_to_the_same_weights_and_tables(tmp_path, monkeypatch, trainable):
    whole, killed, resumed = (finetuning(trainable=trainable) for _ in range(3))
    metrics = run(whole, tmp_path / "whole")
    at_pass(6, die, killed, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(killed, tmp_path / "killed")
    assert metrics["num_trained_tokens"] == 3 * 4 * TOKENS
    (checkpoint,) = (tmp_path / "killed" / "run").glob("checkpoint-*")
    assert sum(f.stat().st_size for f in checkpoint.glob("model*")) < 20 * 1024  # without the base
    assert run(resumed, tmp_path / "killed") == metrics
    want = whole.model.state_dict()
    assert all(torch.equal(want[n], x) for n, x in resumed.model.state_dict().items())
    for table in ("history.tsv", "memory.tsv"):
        texts = [(tmp_path / name / table).read_text() for name in ("whole", "killed")]
        assert texts[0] == texts[1]
    start, place = finetuning().model.state_dict(), "self_attn" if trainable == "lora" else ".0."
    changed = {name for name in want if not torch.equal(want[name], start[name])}
    assert changed == {name for name in want if "self_attn" in name and place in name}


def test_patience_goes_on_counting_after_a_kill(tmp_path, monkeypatch):
    def start(losses: list[float], last_pass: int) -> dict:
        task, values = finetuning(), iter(losses)
        at_pass(last_pass, die, task, monkeypatch)
        monkeypatch.setattr(
            task, "validate", lambda val: {"val_loss": next(values), "val_ppl": 2.0}
        )
        return run(task, tmp_path, epochs=9, patience=2)

    with pytest.raises(KeyboardInterrupt):
        start([9.0, 5.0, 6.0], last_pass=2 * 4 + 1)
    metrics = start([7.0, 8.0, 9.0], last_pass=99)
    assert metrics["epochs_run"] == 3
    assert metrics["best_epoch"] == 1


def test_a_run_that_stopped_early_and_died_trains_no_further_wherever_it_was_moved(
    tmp_path, monkeypatch
):
    def start(folder: Path) -> tuple[dict, Tensor]:
        task, values = finetuning(), iter([9.0, 5.0, 6.0, 7.0, 1.0])
        monkeypatch.setattr(
            task, "validate", lambda val: {"val_loss": next(values), "val_ppl": 2.0}
        )
        with monkeypatch.context() as patch:
            if folder.name == "killed":
                patch.setattr(task, "merge", lambda: die(None))
            metrics = run(task, folder, epochs=9, patience=2)
        return metrics, infini_modules(task.model)[0].q_proj.weight

    metrics, weight = start(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "killed")
    (tmp_path / "killed").rename(tmp_path / "moved")
    (tmp_path / "moved" / "history.tsv").unlink()
    found, resumed = start(tmp_path / "moved")
    assert found == metrics
    assert torch.equal(resumed, weight)
    texts = [(tmp_path / name / "history.tsv").read_text() for name in ("whole", "moved")]
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that died in its third epoch; the first one is the best."""
    folder = tmp_path_factory.mktemp("two_epochs")
    task = finetuning()
    with pytest.MonkeyPatch.context() as patch:
        at_pass(2 * STEPS + 1, die, task, patch)
        with pytest.raises(KeyboardInterrupt):
            run(task, folder)
    return folder


DAMAGE = {
    "missing": Path.unlink,
    "short": lambda file: file.write_bytes(file.read_bytes()[:-2]),
    "damaged": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + b"rest"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_torn_checkpoint_is_deleted_and_the_one_before_is_the_last(
    two_epochs, tmp_path, capsys, kind
):
    files = {file.name for file in (two_epochs / "run" / "checkpoint-8").iterdir()}
    assert {MANIFEST, "trainer_state.json", "optimizer.pt", "rng_state.pth"} < files
    for name in files:
        folder = tmp_path / name
        shutil.copytree(two_epochs / "run", folder)
        assert last_whole(folder) == str(folder / "checkpoint-8")
        DAMAGE[kind](folder / "checkpoint-8" / name)
        assert last_whole(folder) == str(folder / "checkpoint-4")
        assert capsys.readouterr().out.startswith(f"{folder}/checkpoint-8 is skipped: a file ")
        assert [path.name for path in folder.iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize(("torn", "num_epochs"), [("checkpoint-8", 2), ("checkpoint-4", 3)])
def test_with_an_empty_checkpoint_a_run_ends_as_an_undisturbed_one(
    two_epochs, tmp_path, torn, num_epochs
):
    """The fourth step's is the best one: without it, the eighth's is worth nothing."""
    whole, resumed = finetuning(), finetuning()
    metrics = run(whole, tmp_path / "whole")
    assert metrics["best_epoch"] == 1
    shutil.copytree(two_epochs, tmp_path / "torn")
    shutil.rmtree(tmp_path / "torn" / "run" / torn)
    (tmp_path / "torn" / "run" / torn).mkdir()
    passes = []
    resumed.register_forward_hook(lambda *_: passes.append(resumed.training))
    assert run(resumed, tmp_path / "torn") == metrics
    assert passes.count(True) == num_epochs * STEPS
    want = whole.model.state_dict()
    assert all(torch.equal(want[n], x) for n, x in resumed.model.state_dict().items())
    for table in ("history.tsv", "memory.tsv"):
        texts = [(tmp_path / name / table).read_text() for name in ("whole", "torn")]
        assert texts[0] == texts[1]


def test_a_bfloat16_model_trains_float32_weights_like_a_float32_one(tmp_path):
    losses, start = [], infini_modules(finetuning().model)[0].q_proj.weight
    for dtype in (torch.float32, torch.bfloat16):
        task = finetuning(dtype=dtype)
        assert torch.equal(infini_modules(task.model)[0].q_proj.weight, start)
        losses.append(run(task, tmp_path / str(dtype), epochs=1)["val_loss"])
        for parameter in task.parameters():
            assert parameter.dtype is (torch.float32 if parameter.requires_grad else dtype)
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_the_best_epoch_s_weights_are_kept_and_patience_ends_the_run(
    tmp_path, monkeypatch, capsys
):
    task, weights = finetuning(), []
    losses = iter([9.0, 5.0, 6.0, 7.0, 1.0])

    def validate(val: Tensor) -> dict[str, float]:
        weights.append(infini_modules(task.model)[0].q_proj.weight.clone())
        return {"val_loss": next(losses), "val_ppl": 2.0}

    monkeypatch.setattr(task, "validate", validate)
    metrics = run(task, tmp_path, epochs=9, patience=2)
    assert metrics["best_epoch"] == 1
    assert metrics["epochs_run"] == 3
    assert capsys.readouterr().out.endswith("stopped early after epoch 3, best 1\n")
    kept = infini_modules(task.model)[0].q_proj.weight
    assert torch.equal(kept, weights[1])
    assert not torch.equal(kept, weights[3])


def at_pass(number: int, act: Callable, task: TrainingTask, patch: pytest.MonkeyPatch) -> None:
    """Let one forward pass of a run act on its output."""
    forward, passes = task.forward, count(1)

    def spoiled(input_ids: Tensor) -> dict[str, Tensor]:
        output = forward(input_ids)
        return act(output) if next(passes) == number else output

    patch.setattr(task, "forward", spoiled)


def die(_: object) -> None:
    raise KeyboardInterrupt


def test_a_loss_that_is_not_finite_stops_with_epoch_and_step(tmp_path, monkeypatch):
    task = finetuning()
    at_pass(6, lambda output: {"loss": output["loss"] * math.nan}, task, monkeypatch)
    message = (
        r"^training diverged in epoch 2, step 6: the training loss is nan; nothing was written, "
        r"try a smaller lr$"
    )
    with pytest.raises(FloatingPointError, match=message):
        run(task, tmp_path)
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    monkeypatch.setattr(task, "validate", lambda val: {"val_loss": math.inf, "val_ppl": 2.0})
    with pytest.raises(FloatingPointError, match="epoch 0, step 0: the validation loss is inf"):
        run(task, tmp_path / "validation")


def test_without_epochs_the_model_is_only_validated_and_that_is_said(tmp_path, capsys):
    metrics = run(finetuning(), tmp_path, epochs=0)
    said = capsys.readouterr().out.strip().splitlines()
    assert said[-1] == "nothing is trained, because its epochs are 0"
    assert (metrics["best_epoch"], metrics["epochs_run"]) == (0, 0)
    row = f"0\tval\t{metrics['val_loss']}\t{metrics['val_ppl']}\n"
    assert (tmp_path / "history.tsv").read_text() == "epoch\tsplit\tloss\tppl\n" + row
    assert not (tmp_path / "run").exists()


def test_tensorboard_is_told_where_it_is_installed_and_nothing_else_is(tmp_path, monkeypatch):
    class Callback(TrainerCallback):
        logging_dir, told = None, []

        def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
            self.told.append((self.logging_dir, *logs))

    monkeypatch.setattr(loop, "TensorBoardCallback", Callback)
    for is_installed in (False, True):
        monkeypatch.setattr(loop, "is_tensorboard_available", [is_installed].pop)
        run(finetuning(), tmp_path / str(is_installed), epochs=1)
        assert bool(Callback.told) == is_installed
    assert {where for where, *_ in Callback.told} == {"runs/run"}
    monkeypatch.setattr(loop, "is_tensorboard_available", lambda: True)
    ids, params = random_ids(64, 3, TOKENS), finetune_params(epochs=1)
    parts = [(finetuning(), ids), (finetuning(), ids)]
    loop.train(parts, ids, params, tmp_path / "two", tmp_path / "two.tsv")
    assert {where for where, *_ in Callback.told} == {"runs/run", "runs/two", "runs/two/part-2"}
    assert any("eval_val_ppl" in names for names in Callback.told)
