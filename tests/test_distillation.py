"""Distilling: its targets, and that it goes towards them."""

from dataclasses import replace

import pytest
import torch

from infini_retrofit.distillation import Distillation, DistillParams
from infini_retrofit.history import no_ppl
from infini_retrofit.perplexity import score_rows, total
from infini_retrofit.retrofit import decoder_layers
from infini_retrofit.training import train
from tests.reference import infini_params, record_layers
from tests.tiny import FAMILIES, random_ids, tiny_llama, tiny_model

INFINI = infini_params(
    layers=[0],
    init="random_attention",
    local="linear",
    positions="none",
    segment_length=8,
    initial_memory_share=0.02,
)
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


@pytest.mark.parametrize("objective", ["layer_output", "attention_output"])
def test_distilling_lowers_the_loss_and_needs_no_teacher_in_its_checkpoint(tmp_path, objective):
    params = DistillParams(**DISTILL | {"objective": objective, "epochs": 8})
    trainee = Distillation(tiny_llama(), INFINI, params, torch.float32)
    assert set(trainee.state_dict()) == {
        name for name, p in trainee.named_parameters() if p.requires_grad
    }
    samples = random_ids(67, 6, 32), random_ids(67, 2, 32, seed=1)
    before = trainee.validate(samples[1])["val_loss"]
    history = tmp_path / "history.tsv"
    metrics = train(trainee, *samples, params, tmp_path / "run", history, no_ppl)
    assert metrics["val_loss"] < 0.9 * before
    assert "\t\n" in history.read_text()  # no perplexity of an MSE


@pytest.mark.parametrize("objective", ["layer_output", "attention_output"])
def test_distilling_targets_are_the_base_s_own_outputs(objective):
    params, ids = DistillParams(**DISTILL | {"objective": objective}), random_ids(67, 2, 32)
    exact = infini_params(memory="off", segment_length=32)
    assert Distillation(tiny_llama(), exact, params, torch.float32)(ids)["loss"] < 1e-12
    for different in (replace(exact, segment_length=8), replace(INFINI, layers="all")):
        assert Distillation(tiny_llama(), different, params, torch.float32)(ids)["loss"] > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_given_what_the_base_s_was_given_not_what_another_student_returned(family):
    params = DistillParams(**DISTILL)
    model = tiny_model(family)
    trainee = Distillation(model, replace(INFINI, layers=[0, 2]), params, torch.float32)
    ids, given = random_ids(model.config.vocab_size, 2, 32), []
    want = record_layers(tiny_model(family), ids)["given"]
    for index in (0, 2):
        decoder_layers(model)[index].register_forward_pre_hook(
            lambda _, args, kwargs: given.append((*args, *kwargs.values())[0]), with_kwargs=True
        )
    trainee(ids)
    assert [torch.equal(x, want[i]) for x, i in zip(given, (0, 2), strict=True)] == [True] * 2
    assert not torch.equal(record_layers(model, ids)["given"][2], want[2])


def test_validation_weighs_samples_alike_and_scores_the_whole_model():
    trainee = Distillation(tiny_llama(), INFINI, DistillParams(**DISTILL), torch.float32)
    rows = random_ids(67, 3, 32)
    with torch.no_grad():
        metrics = trainee.validate(rows)
        losses = [trainee(row[None])["loss"].item() for row in rows]
    assert metrics["val_loss"] == pytest.approx(sum(losses) / 3)
    assert metrics["val_ppl"] == pytest.approx(total(score_rows(trainee.model, rows)).ppl)
    assert metrics["val_ppl"] != pytest.approx(total(score_rows(tiny_llama(), rows)).ppl, rel=1e-4)
