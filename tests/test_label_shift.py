"""The double label shift, reproduced: what is learned, what validated, what refused."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infini_retrofit.model.running import run_folded
from infini_retrofit.scoring.labels import t2_nlls
from infini_retrofit.scoring.score import Score, score_segments, segment_runs, total
from infini_retrofit.training.control import ControlParams, make_control
from infini_retrofit.training.finetuning import Finetuning
from tests.reference import largest
from tests.tiny import FAMILIES, Family, random_ids, tiny_model
from tests.tiny_training import INFINI, SEGMENT, TOKENS, finetune_params, finetuning, run

TWICE = {"label_shift": 2}


def control(family: Family, **over: object) -> Finetuning:
    """Make the base, confined to segments, that is to be fine-tuned."""
    model = tiny_model(family)
    make_control(model, INFINI)
    return Finetuning(model, INFINI, finetune_params(**over), torch.float32)


def ids_of(trainee: Finetuning) -> Tensor:
    return random_ids(trainee.model.config.vocab_size, 2, TOKENS, seed=2)


def plain_loss(trainee: Finetuning, ids: Tensor, shift: int, borders: bool) -> Tensor:
    """Compute the loss position by position.

    Args:
        trainee: holds the model.
        ids: documents.
        shift: how far ahead a position's label stands.
        borders: whether a label may stand in the next segment.
    """
    logits = trainee.model.get_output_embeddings()(run_folded(trainee.model, ids, SEGMENT))
    losses = []
    for row, found in zip(ids, logits, strict=True):
        for t in range(len(row) - shift):
            if borders or t // SEGMENT == (t + shift) // SEGMENT:
                losses.append(F.cross_entropy(found[t], row[t + shift]))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trainable", ["infini", "all"])
def test_each_position_learns_the_token_after_the_next_of_its_own_segment(family, trainable):
    trainee = finetuning(family, trainable=trainable, **TWICE)
    ids, trained = ids_of(trainee), [p for p in trainee.parameters() if p.requires_grad]
    losses = [trainee(ids)["loss"], plain_loss(trainee, ids, 2, borders=False)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, trained) for loss in losses]
    for one, want in zip(*gradients, strict=True):
        assert largest(one - want) < 1e-4 * max(1, largest(want))
    others = [plain_loss(trainee, ids, 2, borders=True), plain_loss(trainee, ids, 1, borders=True)]
    assert all(abs(other - losses[0]) > 1e-3 for other in others)
    once = finetuning(family, trainable=trainable)
    assert once(ids)["loss"].item() == pytest.approx(others[1].item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_loss_of_a_model_that_shifts_labels_which_were_shifted_already(family):
    trainee, base = control(family, **TWICE), tiny_model(family)
    ids = ids_of(trainee)
    segments = ids.view(-1, SEGMENT)
    want = base(input_ids=segments[:, :-1], labels=segments[:, 1:]).loss
    assert trainee(ids)["loss"].item() == pytest.approx(want.item(), rel=1e-5)
    right = base(input_ids=segments, labels=segments).loss
    assert abs(trainee(ids)["loss"].item() - right.item()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [finetuning, control])
def test_the_validation_loss_is_of_the_same_kind_and_the_perplexity_is_not(family, make):
    trainee = make(family, **TWICE)
    ids = ids_of(trainee)
    metrics = trainee.run_validation(ids)
    right = total(score_segments(trainee.model, ids, SEGMENT))
    runs = segment_runs(trainee.model, ids, SEGMENT)
    shifted = total(Score.of(t2_nlls(trainee.model, *row, SEGMENT)) for row in runs)
    assert shifted.num_scored == 2 * TOKENS // SEGMENT * (SEGMENT - 2)
    assert metrics["val_loss"] == pytest.approx(shifted.nll, rel=1e-6)
    assert metrics["t2_val_ppl"] == pytest.approx(shifted.ppl, rel=1e-6)
    assert metrics["val_ppl"] == pytest.approx(right.ppl, rel=1e-6)
    assert metrics["val_ppl"] != pytest.approx(metrics["t2_val_ppl"], rel=1e-3)
    once = make(family).run_validation(ids)
    assert "t2_val_ppl" not in once
    assert once["val_loss"] == pytest.approx(right.nll, rel=1e-6)


def train_by_hand(trainee: Finetuning, documents: Tensor) -> dict[str, float]:
    """Take some steps and validate on the same documents: they are learned by heart."""
    optimizer = torch.optim.Adam([p for p in trainee.parameters() if p.requires_grad], lr=1e-2)
    trainee.train()
    for _ in range(20):
        optimizer.zero_grad()
        trainee(documents)["loss"].backward()
        optimizer.step()
    return trainee.run_validation(documents)


def test_training_for_the_wrong_token_lowers_its_score_and_ruins_the_right_one():
    documents = random_ids(67, 1, SEGMENT, seed=3).repeat(2, TOKENS // SEGMENT)
    twice, once = (finetuning(trainable="all", label_shift=shift) for shift in (2, 1))
    before = twice.run_validation(documents)
    after, right = train_by_hand(twice, documents), train_by_hand(once, documents)
    assert after["t2_val_ppl"] < 0.2 * before["t2_val_ppl"]
    assert after["val_ppl"] > before["val_ppl"] > 5 * right["val_ppl"]


def test_a_run_writes_no_perplexity_for_a_loss_that_is_none(tmp_path):
    metrics = run(finetuning(**TWICE), tmp_path, **TWICE)
    assert metrics["t2_val_ppl"] == pytest.approx(math.exp(metrics["val_loss"]))
    assert metrics["val_ppl"] != pytest.approx(metrics["t2_val_ppl"], rel=1e-3)
    rows = [line.split("\t") for line in (tmp_path / "history.tsv").read_text().splitlines()[1:]]
    assert {row[1] for row in rows if row[3] == ""} == {"train"}
    assert {row[1] for row in rows if row[3] != ""} == {"val"}


def test_the_control_learns_the_same_labels_whatever_else_it_does_differently():
    own = ControlParams(trainable="attention", lr=1e-3)
    assert own.applied_to(finetune_params(**TWICE)).label_shift == 2


def test_the_base_s_prediction_of_the_next_token_is_no_teacher_of_another():
    message = r"^finetune\.kl_weight must be 0 when finetune\.label_shift is 2, .*, got 0\.1$"
    with pytest.raises(ValueError, match=message):
        replace(finetune_params(**TWICE), kl_weight=0.1)
