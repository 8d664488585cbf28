"""The Trainer under our frame: what it trains, how it stops, how it resumes."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from infini_retrofit.attention import InfiniParams
from infini_retrofit.distillation import Distillation, DistillParams
from infini_retrofit.finetuning import FinetuneParams, Finetuning, LrScale, make_control
from infini_retrofit.perplexity import score_segments, total
from infini_retrofit.retrofit import infini_modules, insert_infini
from infini_retrofit.training import history, no_ppl, ppl_of_nll, train
from tests.tiny import FAMILIES, random_ids, tiny_llama, tiny_model

SEGMENT = 8
INFINI = {
    "layers": [0],
    "insertion": "replace",
    "init": "random_attention",
    "local": "linear",
    "positions": "none",
    "heads": "base",
    "memory": "on",
    "segment_length": SEGMENT,
    "local_context": 0,
    "initial_memory_share": 0.02,
}
DISTILL = {
    "objective": "layer_output",
    "samples": 6,
    "val_samples": 2,
    "tokens_per_sample": 32,
    "batch_size": 2,
    "epochs": 3,
    "lr": 1e-2,
    "patience": 3,
    "min_delta": 0.0,
    "seed": 0,
}
FINETUNE = {
    "trainable": "infini",
    "train_documents": 4,
    "val_documents": 3,
    "batch_size": 1,
    "epochs": 3,
    "lr": 1e-2,
    "lr_scale": LrScale(infini=1.0, rest=0.5),
    "patience": 3,
    "min_delta": 0.0,
    "seed": 0,
}


def finetuning(family: str = "llama", **over: object) -> Finetuning:
    model, infini = tiny_model(family), InfiniParams(**INFINI)
    insert_infini(model, infini)
    return Finetuning(model, infini, FinetuneParams(**FINETUNE | over))


def run(trainee: Finetuning, folder: Path, epochs: int = 3, **over: object) -> dict:
    params = FinetuneParams(**FINETUNE | {"epochs": epochs} | over)
    vocab_size = trainee.model.config.vocab_size
    train_documents = random_ids(vocab_size, 4, 32)
    val_documents = random_ids(vocab_size, 3, 32, seed=1)
    return train(
        trainee, train_documents, val_documents, params, folder / "run", folder / "history.tsv"
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


def test_the_gate_has_a_rate_that_can_move_it(tmp_path):
    trainee = finetuning()
    before = infini_modules(trainee.model)[0].gate_logit.clone()
    run(trainee, tmp_path, epochs=3, lr=1e-9)
    moved = (infini_modules(trainee.model)[0].gate_logit - before).abs().max()
    assert moved > 0.1


def test_the_reported_validation_is_the_protocol_s_own_number(tmp_path):
    trainee = finetuning()
    metrics = run(trainee, tmp_path)
    val = random_ids(trainee.model.config.vocab_size, 3, 32, seed=1)
    score = total(score_segments(trainee.model.eval(), val, SEGMENT)[0])
    assert score.num_scored == 3 * 31
    assert metrics["val_ppl"] == pytest.approx(score.ppl, rel=1e-6)


def test_a_killed_run_resumes_to_the_same_weights_and_history(tmp_path, monkeypatch):
    whole = finetuning()
    metrics = run(whole, tmp_path / "whole")

    killed = finetuning()
    validate, calls = killed.validate, []

    def die_in_the_third_validation(val: torch.Tensor) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return validate(val)

    monkeypatch.setattr(killed, "validate", die_in_the_third_validation)
    with pytest.raises(KeyboardInterrupt):
        run(killed, tmp_path / "killed")
    resumed = finetuning()
    assert run(resumed, tmp_path / "killed") == metrics
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0)
    histories = [(tmp_path / name / "history.tsv").read_text() for name in ("whole", "killed")]
    assert histories[0] == histories[1]


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


def test_distilling_lowers_the_loss_and_needs_no_teacher_in_its_checkpoint(tmp_path):
    for objective in ("layer_output", "attention_output"):
        params = DistillParams(**DISTILL | {"objective": objective, "epochs": 8})
        trainee = Distillation(tiny_llama(), InfiniParams(**INFINI), params)
        assert set(trainee.state_dict()) == {
            name for name, p in trainee.named_parameters() if p.requires_grad
        }
        samples = random_ids(67, 6, 32), random_ids(67, 2, 32, seed=1)
        before = trainee.validate(samples[1])["val_loss"]
        folder = tmp_path / objective
        metrics = train(trainee, *samples, params, folder / "run", folder / "history.tsv", no_ppl)
        assert metrics["val_loss"] < 0.9 * before
        assert "\t\n" in (folder / "history.tsv").read_text()  # no perplexity of an MSE


def test_distilling_targets_are_the_base_s_own_outputs():
    base, infini = tiny_llama(), InfiniParams(**INFINI | {"layers": "all"})
    exact = InfiniParams(
        **INFINI
        | {"layers": "all", "init": "base", "local": "softmax", "positions": "rope"}
        | {"memory": "off", "segment_length": 32}
    )
    ids = random_ids(67, 2, 32)
    for objective in ("layer_output", "attention_output"):
        params = DistillParams(**DISTILL | {"objective": objective})
        assert Distillation(base, exact, params)(ids)["loss"] < 1e-12
        base = tiny_llama()
        assert Distillation(base, infini, params)(ids)["loss"] > 1e-3
        base = tiny_llama()


def test_the_control_is_the_base_confined_to_segments():
    infini = InfiniParams(**INFINI)
    model, ids = tiny_llama(), random_ids(67, 2, 32)
    want = total(score_segments(tiny_llama(), ids, SEGMENT)[0])
    control = make_control(model, infini)
    assert control.memory == "off"
    assert total(score_segments(model, ids, SEGMENT)[0]).nll == pytest.approx(want.nll, rel=1e-6)
    groups = Finetuning(model, infini, FinetuneParams(**FINETUNE)).groups
    assert not groups["gate"]
    assert len(groups["infini"]) == 4


def test_the_control_trains_the_same_layers_as_a_retrofit_of_whole_layers():
    infini = InfiniParams(**INFINI | {"init": "random_layer"})
    model = tiny_llama()
    make_control(model, infini)
    names = {n for n, p in Finetuning(model, infini, FinetuneParams(**FINETUNE)).named_parameters()
             if p.requires_grad}  # fmt: skip
    assert any("mlp" in name for name in names)
    assert all(".layers.0." in name for name in names)


def test_history_is_one_row_an_epoch_and_split():
    log = [
        {"epoch": 0, "eval_val_loss": 3.0, "eval_val_ppl": 20.0},
        {"epoch": 1.0, "loss": 2.0, "learning_rate": 0.1},
        {"epoch": 1.0, "eval_val_loss": 2.5, "eval_val_ppl": 12.0},
        {"epoch": 1.0, "train_runtime": 3.0},
    ]
    assert history(log, ppl_of_nll) == [
        {"epoch": 0, "split": "val", "loss": 3.0, "ppl": 20.0},
        {"epoch": 1, "split": "train", "loss": 2.0, "ppl": pytest.approx(math.exp(2))},
        {"epoch": 1, "split": "val", "loss": 2.5, "ppl": 12.0},
    ]


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("distill", {"epochs": 0}, "distill.epochs must be at least 1, got 0"),
        ("distill", {"lr": 0.0}, "distill.lr must be greater than 0, got 0.0"),
        ("distill", {"samples": 0}, "distill.samples must be at least 1, got 0"),
        ("distill", {"tokens_per_sample": 1}, "distill.tokens_per_sample must be at least 2"),
        ("finetune", {"patience": 0}, "finetune.patience must be at least 1, got 0"),
        ("finetune", {"min_delta": -1.0}, "finetune.min_delta must be at least 0, got -1.0"),
        ("finetune", {"val_documents": 0}, "finetune.val_documents must be at least 1, got 0"),
    ],
)
def test_bad_parameters_are_refused_by_name(section, change, message):
    cls, good = {"distill": (DistillParams, DISTILL), "finetune": (FinetuneParams, FINETUNE)}[
        section
    ]
    assert SimpleNamespace(**vars(cls(**good)))
    with pytest.raises(ValueError, match=message):
        cls(**good | change)


def test_a_negative_learning_rate_scale_is_refused():
    with pytest.raises(ValueError, match=r"finetune\.lr_scale\.rest must be at least 0, got -1"):
        LrScale(infini=1.0, rest=-1.0)
