"""The Trainer under our frame: what it trains, how it stops, how it resumes."""

import math
from pathlib import Path

import pytest
import torch

from infini_retrofit.model.retrofit import infini_modules, insert_infini
from infini_retrofit.scoring.score import score_segments, total
from infini_retrofit.training.finetuning import Finetuning
from infini_retrofit.training.loop import ALPHA_TRAVEL, GATE_TRAVEL, MAX_ALPHA_RATE, MAX_GATE_RATE
from infini_retrofit.training.schedule import FullLrScale, rate_factor
from tests.reference import largest
from tests.tiny import FAMILIES, random_ids, tiny_llama
from tests.tiny_training import (
    INFINI,
    SEGMENT,
    die_in_the_third_validation,
    finetune_params,
    finetuning,
    run,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_chosen_part_trains(tmp_path, family):
    trainee = finetuning(family)
    before = {k: v.clone() for k, v in trainee.model.state_dict().items()}
    metrics = run(trainee, tmp_path)
    changed = {k for k, v in trainee.model.state_dict().items() if not torch.equal(v, before[k])}
    attention = infini_modules(trainee.model)[0]
    assert len(changed) == len(list(attention.parameters()))
    assert all(".0." in name for name in changed)
    assert metrics["num_trainable_parameters"] == sum(p.numel() for p in attention.parameters())
    assert metrics["num_trained_tokens"] == 3 * 4 * 32


@pytest.mark.parametrize("part", ["infini", "attention", "all"])
def test_parameter_groups_hold_each_trainable_parameter_once(part):
    trainee = finetuning(trainable=part)
    grouped = [id(p) for group in trainee.groups.values() for p in group]
    trainable = [id(p) for p in trainee.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable)
    assert len(trainee.groups["gate"]) == 1
    assert len(trainee.groups["infini"]) == 4
    assert bool(trainee.groups["rest"]) == (part != "infini")


@pytest.mark.parametrize(
    ("name", "form"), [("gate_logit", {}), ("alpha", {"insertion": "parallel"})]
)
def test_what_weighs_a_branch_has_a_rate_that_can_move_it(tmp_path, name, form):
    trainee = finetuning(form=form)
    branch = infini_modules(trainee.model)[0]
    before = {n: p.detach().clone() for n, p in branch.named_parameters()}
    run(trainee, tmp_path, lr=1e-9)
    moved = {n: largest(p - before[n]) for n, p in branch.named_parameters()}
    assert moved[name] > 0.1
    assert moved["q_proj.weight"] < 1e-6


def rates_of(folder: Path, patch: pytest.MonkeyPatch, epochs: int) -> list[tuple[float, ...]]:
    """Train on 4 documents and return the rate of each step, by group: gate, alpha, others."""
    rates = []
    take = torch.optim.AdamW.step

    def spy(optimizer: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        rates.append([group["lr"] for group in optimizer.param_groups])
        return take(optimizer, *args, **kwargs)

    patch.setattr(torch.optim.AdamW, "step", spy)
    scale = FullLrScale(memory=3.0, infini=2.0, rest=1.0)
    form = {"insertion": "parallel", "feature_map": "hedgehog"}
    trainee = finetuning(form=form, trainable="attention", lr_scale=scale)
    patch.setattr(trainee, "validate", lambda val: {"val_loss": 1.0, "val_ppl": 2.0})
    run(trainee, folder, lr=1e-3, epochs=epochs, patience=epochs)
    return list(zip(*rates, strict=True))


def test_a_rate_of_a_group_of_its_own_spans_the_run(tmp_path, monkeypatch):
    rates = rates_of(tmp_path, monkeypatch, epochs=9)
    gate, alpha, memory, infini, rest = map(sum, rates)
    assert gate == pytest.approx(GATE_TRAVEL)
    assert alpha == pytest.approx(ALPHA_TRAVEL)
    assert (memory / rest, infini / rest) == (pytest.approx(3), pytest.approx(2))
    assert rest < len(rates[0]) * 1e-3


def test_in_a_run_of_few_steps_no_step_moves_a_gate_far(tmp_path, monkeypatch):
    gate, alpha, *_ = rates_of(tmp_path, monkeypatch, epochs=1)
    assert (max(gate), max(alpha)) == (pytest.approx(MAX_GATE_RATE), pytest.approx(MAX_ALPHA_RATE))
    assert sum(gate) < GATE_TRAVEL
    assert sum(alpha) < ALPHA_TRAVEL


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


def test_the_reported_validation_is_the_protocol_s_own_number(tmp_path):
    trainee = finetuning()
    metrics = run(trainee, tmp_path)
    val = random_ids(trainee.model.config.vocab_size, 3, 32, seed=1)
    score = total(score_segments(trainee.model.eval(), val, SEGMENT))
    assert score.num_scored == 3 * 31
    assert metrics["val_ppl"] == pytest.approx(score.ppl, rel=1e-6)


def test_a_killed_run_resumes_to_the_same_weights_and_history(tmp_path, monkeypatch):
    whole = finetuning()
    metrics = run(whole, tmp_path / "whole")

    killed = finetuning()
    die_in_the_third_validation(killed, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(killed, tmp_path / "killed")
    resumed = finetuning()
    assert run(resumed, tmp_path / "killed") == metrics
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0)
    histories = [(tmp_path / name / "history.tsv").read_text() for name in ("whole", "killed")]
    assert histories[0] == histories[1]


def test_patience_goes_on_counting_after_a_kill(tmp_path, monkeypatch):
    def start(losses: list[float], steps_to_live: int) -> dict:
        trainee, steps = finetuning(), iter(range(steps_to_live))
        forward, values = trainee.forward, iter(losses)

        def mortal(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return forward(input_ids)

        monkeypatch.setattr(trainee, "forward", mortal)
        monkeypatch.setattr(
            trainee, "validate", lambda val: {"val_loss": next(values), "val_ppl": 2.0}
        )
        return run(trainee, tmp_path, epochs=9, patience=2)

    with pytest.raises(KeyboardInterrupt):
        start([9.0, 5.0, 6.0], steps_to_live=2 * 4 + 1)
    metrics = start([7.0, 8.0, 9.0], steps_to_live=99)
    assert metrics["epochs_run"] == 3
    assert metrics["best_epoch"] == 1


def test_a_bfloat16_model_trains_float32_weights_like_a_float32_one(tmp_path):
    metrics = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama()
        insert_infini(model, INFINI)
        start = infini_modules(model)[0].q_proj.weight.clone()
        trainee = Finetuning(model, INFINI, finetune_params(), dtype)
        assert torch.equal(infini_modules(model)[0].q_proj.weight, start)
        metrics[dtype] = run(trainee, tmp_path / str(dtype), epochs=1)
        for parameter in trainee.parameters():
            assert parameter.dtype is (torch.float32 if parameter.requires_grad else dtype)
    losses = [m["val_loss"] for m in metrics.values()]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_the_best_epoch_s_weights_are_kept_and_patience_ends_the_run(tmp_path, monkeypatch):
    trainee = finetuning()
    losses = iter([9.0, 5.0, 6.0, 7.0, 1.0])
    weights = []

    def validate(val: torch.Tensor) -> dict[str, float]:
        weights.append(infini_modules(trainee.model)[0].q_proj.weight.clone())
        return {"val_loss": next(losses), "val_ppl": 2.0}

    monkeypatch.setattr(trainee, "validate", validate)
    metrics = run(trainee, tmp_path, epochs=9, patience=2)
    assert metrics["best_epoch"] == 1
    assert metrics["epochs_run"] == 3
    kept = infini_modules(trainee.model)[0].q_proj.weight
    assert torch.equal(kept, weights[1])
    assert not torch.equal(kept, weights[3])


def test_an_improvement_below_min_delta_counts_as_none(tmp_path, monkeypatch):
    trainee = finetuning()
    losses = iter([9.0, 5.0, 4.9, 4.8, 4.7, 4.6])
    monkeypatch.setattr(trainee, "validate", lambda val: {"val_loss": next(losses), "val_ppl": 2.0})
    metrics = run(trainee, tmp_path, epochs=5, patience=2, min_delta=0.5)
    assert metrics["epochs_run"] == 3


def test_a_loss_that_is_not_finite_stops_with_epoch_and_step(tmp_path):
    trainee = finetuning()
    forward, calls = trainee.forward, []

    def poisoned(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"loss": forward(input_ids)["loss"] * (math.nan if len(calls) == 6 else 1.0)}

    trainee.forward = poisoned
    with pytest.raises(FloatingPointError, match=r"epoch 2, step 6: the training loss is nan"):
        run(trainee, tmp_path)
    assert (tmp_path / "run" / "checkpoint-4").is_dir()


def test_the_trainee_knows_where_the_run_stands(tmp_path, monkeypatch):
    trainee, seen = finetuning(), []
    forward = trainee.forward

    def spy(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append((trainee.step, trainee.num_steps))
        return forward(input_ids)

    monkeypatch.setattr(trainee, "forward", spy)
    run(trainee, tmp_path, epochs=2)
    assert seen == [(step, 8) for step in range(8)]
