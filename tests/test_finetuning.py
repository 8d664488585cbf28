"""Fine-tuning: its loss by the plain formula, its labels, its validation, and the control."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.model.running import run_folded, run_in_layer
from infini_retrofit.scoring.labels import t2_nlls
from infini_retrofit.scoring.memory_use import read_memory
from infini_retrofit.scoring.score import Score, score_segments, segment_runs, total
from infini_retrofit.training.control import ControlParams, make_control
from infini_retrofit.training.finetuning import Finetuning, Teacher, check_trainable
from tests.reference import both_families, largest
from tests.tiny import random_ids, tiny_llama, tiny_model
from tests.tiny_training import INFINI, SEGMENT, TOKENS, finetune_params, finetuning, run

TWICE = {"label_shift": 2}


def ids_of(trainee: Finetuning, num_documents: int = 2) -> Tensor:
    return random_ids(trainee.model.config.vocab_size, num_documents, TOKENS, seed=2)


def assert_same(trainee: Finetuning, loss: Tensor, want: Tensor) -> None:
    """Compare two losses and their gradients."""
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    trained = [p for p in trainee.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(x, trained, allow_unused=True) for x in (loss, want)]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert other is None or largest(one - other) < 1e-4 * max(1, largest(other))


def plain_loss(trainee: Finetuning, ids: Tensor, shift: int = 1, across: bool = True) -> Tensor:
    """Compute the cross-entropy position by position.

    Args:
        trainee: holds the model.
        ids: documents.
        shift: distance of a position's label.
        across: whether a label may be in the next segment.
    """
    logits = trainee.model.get_output_embeddings()(run_folded(trainee.model, ids, SEGMENT))
    losses = []
    for row, predicted in zip(ids, logits, strict=True):
        for t in range(len(row) - shift):
            if across or t // SEGMENT == (t + shift) // SEGMENT:
                losses.append(F.cross_entropy(predicted[t], row[t + shift]))
    return torch.stack(losses).mean()


def plain_kl(trainee: Finetuning, ids: Tensor, expected: Tensor) -> Tensor:
    """Compute the divergence from a base, given its last hidden states."""
    head = trainee.model.get_output_embeddings()
    student = head(run_folded(trainee.model, ids, SEGMENT))[:, :-1].flatten(0, 1)
    teacher = trainee.teacher.base.get_output_embeddings()(expected)[:, :-1].flatten(0, 1)
    log_p, log_q = (x.log_softmax(-1) for x in (student, teacher))
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


@both_families
@pytest.mark.parametrize("trainable", ["infini", "all"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_the_loss_is_the_weighted_sum_and_its_gradient_is_that_of_all_logits(
    family, trainable, kl_weight
):
    trainee = finetuning(family, trainable=trainable, kl_weight=kl_weight)
    ids = ids_of(trainee)
    want = (1 - kl_weight) * plain_loss(trainee, ids)
    if kl_weight:
        base = tiny_model(family)
        with torch.no_grad():
            segments, whole = run_folded(base, ids, SEGMENT), run_in_layer(base, ids)
        nll, want = want, want + kl_weight * plain_kl(trainee, ids, segments)
        assert abs(nll + kl_weight * plain_kl(trainee, ids, whole) - want) > 1e-3
    assert_same(trainee, trainee(ids)["loss"], want)


@both_families
def test_the_base_confined_to_segments_does_not_diverge_from_itself(family):
    control = finetuning(family, is_control=True, kl_weight=1.0, trainable="all")
    assert abs(control(ids_of(control))["loss"].item()) < 1e-5
    control.teacher = Teacher(tiny_model(family, seed=1), SEGMENT)
    assert control(ids_of(control))["loss"].item() > 0.01


def test_the_teacher_stays_frozen_and_out_of_what_is_saved(tmp_path):
    trainee = finetuning(trainable="all", kl_weight=0.3)
    base = trainee.teacher.base
    before = {name: x.clone() for name, x in base.state_dict().items()}
    run(trainee, tmp_path, epochs=1, kl_weight=0.3)
    assert all(torch.equal(base.state_dict()[name], x) for name, x in before.items())
    assert not any(p.requires_grad for p in base.parameters())
    assert not {id(p) for p in trainee.parameters()} & {id(p) for p in base.parameters()}
    rows = (tmp_path / "history.tsv").read_text().splitlines()
    assert [row.split("\t")[3] == "" for row in rows if "train" in row] == [True]


def test_the_divergence_keeps_a_model_nearer_to_its_base(tmp_path):
    kls = []
    for kl_weight in (0.0, 0.9):
        trainee = finetuning(trainable="all", kl_weight=kl_weight)
        run(trainee, tmp_path / str(kl_weight), kl_weight=kl_weight, epochs=2)
        trainee.teacher = Teacher(tiny_llama(), SEGMENT)
        ids = ids_of(trainee)
        kls.append(plain_kl(trainee, ids, run_folded(tiny_llama(), ids, SEGMENT)).item())
    assert kls[1] < 0.9 * kls[0]


@both_families
@pytest.mark.parametrize("trainable", ["infini", "all"])
def test_each_position_learns_the_token_after_the_next_of_its_own_segment(family, trainable):
    trainee = finetuning(family, trainable=trainable, **TWICE)
    ids = ids_of(trainee)
    loss = trainee(ids)["loss"]
    assert_same(trainee, loss, plain_loss(trainee, ids, 2, across=False))
    for other in (plain_loss(trainee, ids, 2), plain_loss(trainee, ids, 1)):
        assert abs(other - loss) > 1e-3


@both_families
def test_it_is_the_loss_of_a_model_that_shifts_labels_which_were_shifted_already(family):
    trainee, base = finetuning(family, is_control=True, **TWICE), tiny_model(family)
    ids = ids_of(trainee)
    segments = ids.view(-1, SEGMENT)
    want = base(input_ids=segments[:, :-1], labels=segments[:, 1:]).loss
    assert trainee(ids)["loss"].item() == pytest.approx(want.item(), rel=1e-5)
    right = base(input_ids=segments, labels=segments).loss
    assert abs(trainee(ids)["loss"].item() - right.item()) > 1e-3


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


def test_a_run_writes_no_perplexity_for_a_loss_of_other_tokens(tmp_path):
    run(finetuning(**TWICE), tmp_path, **TWICE)
    rows = [line.split("\t") for line in (tmp_path / "history.tsv").read_text().splitlines()[1:]]
    assert {row[1] for row in rows if row[3] == ""} == {"train"}
    assert {row[1] for row in rows if row[3] != ""} == {"val"}


@both_families
@pytest.mark.parametrize("is_control", [False, True])
@pytest.mark.parametrize("label_shift", [1, 2])
def test_validation_is_the_protocols_own_numbers(family, is_control, label_shift):
    trainee = finetuning(family, is_control=is_control, label_shift=label_shift)
    model, ids = trainee.model, ids_of(trainee, 3)
    metrics = trainee.run_validation(ids)
    right = total(score_segments(model, ids, SEGMENT))
    runs = segment_runs(model, ids, SEGMENT)
    shifted = total(Score.of(t2_nlls(model, *row, SEGMENT)) for row in runs)
    assert (right.num_scored, shifted.num_scored) == (3 * (TOKENS - 1), 3 * (TOKENS - 2 * 4))
    assert metrics["val_ppl"] == right.ppl != pytest.approx(shifted.ppl, rel=1e-3)
    if label_shift == 2:
        assert (metrics["val_loss"], metrics["t2_val_ppl"]) == (shifted.nll, shifted.ppl)
    else:
        assert metrics["val_loss"] == right.nll
        assert "t2_val_ppl" not in metrics
    if not is_control:
        assert metrics["segment_val_ppl"] == right.ppl
        off = total(score_segments(model, ids, SEGMENT, "off"))
        assert metrics["segment_off_val_ppl"] == off.ppl


@pytest.mark.parametrize(("is_control", "passes"), [(False, 2), (True, 1)])
def test_validation_runs_documents_once_with_their_memory_and_once_without(is_control, passes):
    trainee, seen = finetuning(is_control=is_control), []
    embedding = trainee.model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, ids, __: seen.append(ids[0].numel()))
    ids = ids_of(trainee, 3)
    trainee.run_validation(ids)
    assert sum(seen) == passes * ids.numel()
    if not is_control:
        read_memory(trainee.model, ids, SEGMENT)
        assert sum(seen) == 3 * ids.numel()  # as readings in a run of their own would cost


def test_the_control_is_the_base_confined_to_segments():
    trainee = finetuning(is_control=True)
    ids = ids_of(trainee)
    want = total(score_segments(tiny_llama(), ids, SEGMENT))
    assert make_control(tiny_llama(), INFINI).memory == "off"
    assert total(score_segments(trainee.model, ids, SEGMENT)).nll == pytest.approx(want.nll)
    assert (len(trainee.groups["gate"]), len(trainee.groups["infini"])) == (0, 4)
    whole = finetuning(form={"init": "random_layer"}, is_control=True)
    names = {name for name, p in whole.named_parameters() if p.requires_grad}
    assert any("mlp" in name for name in names)
    assert all(".layers.0." in name for name in names)


def test_the_control_trains_as_the_retrofit_does_but_for_what_its_own_section_says():
    params = finetune_params(trainable="memory", lr=1e-2, **TWICE)
    assert ControlParams(trainable="same", lr="same").applied_to(params) == params
    own = ControlParams(trainable="attention", lr=1e-4).applied_to(params)
    assert own == replace(params, trainable="attention", lr=1e-4) != params
    with pytest.raises(ValueError, match=r"finetune_control\.lr must be same or above 0, got 0"):
        ControlParams(trainable="same", lr=0.0)


@pytest.mark.parametrize("trainable", ["memory", "infini"])
def test_a_base_without_infini_layers_has_none_that_could_train(trainable):
    plain = replace(INFINI, layers=[])
    message = (
        r"finetune\.trainable must be one of all, attention, lora when infini\.layers is \[\], "
        rf"where no Infini layer could train, got {trainable}"
    )
    with pytest.raises(ValueError, match=message):
        Finetuning(tiny_llama(), plain, finetune_params(trainable=trainable), torch.float32)
    check_trainable(trainable, INFINI)


@pytest.mark.parametrize("trainable", ["attention", "all", "lora"])
def test_a_base_without_infini_layers_trains_what_it_has(trainable, tmp_path):
    model, plain = tiny_llama(), replace(INFINI, layers=[])
    insert_infini(model, plain)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    params = {"trainable": trainable, "epochs": 1}
    trainee = Finetuning(model, plain, finetune_params(**params), torch.float32)
    metrics = run(trainee, tmp_path, **params)
    after = model.state_dict()
    changed = {name for name, x in before.items() if not torch.equal(after[name], x)}
    assert after.keys() == before.keys()
    assert changed == {n for n in before if "self_attn" in n or trainable == "all"}
    assert metrics["num_trainable_parameters"] > 0
    assert (tmp_path / "memory.tsv").read_text() == "epoch\tquantity\tvalue\n"
