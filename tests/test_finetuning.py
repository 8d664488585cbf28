"""Fine-tuning: its loss by the plain formula, its labels, its validation, and the control."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.model.running import run_folded, run_in_layer
from infini_retrofit.scoring.score import Score, score_segments, segment_runs, t2_nlls, total
from infini_retrofit.training.finetuning import Finetuning, finetuning_parts
from infini_retrofit.training.loop import train
from tests.reference import both_families, largest
from tests.tiny import random_ids, tiny_llama, tiny_model
from tests.tiny_training import INFINI, SEGMENT, TOKENS, finetune_params, finetuning, run

TWICE = {"label_shift": 2}


def ids_of(task: Finetuning, num_documents: int = 2) -> Tensor:
    return random_ids(task.model.config.vocab_size, num_documents, TOKENS, seed=2)


def assert_same(task: Finetuning, loss: Tensor, want: Tensor) -> None:
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    trained = [p for p in task.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(x, trained, allow_unused=True) for x in (loss, want)]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert other is None or largest(one - other) < 1e-4 * max(1, largest(other))


def plain_loss(task: Finetuning, ids: Tensor, shift: int = 1, across: bool = True) -> Tensor:
    """Compute the cross-entropy position by position, also `across` segments if asked."""
    logits = task.model.get_output_embeddings()(run_folded(task.model, ids, SEGMENT))
    losses = []
    for row, predicted in zip(ids, logits, strict=True):
        for t in range(len(row) - shift):
            if across or t // SEGMENT == (t + shift) // SEGMENT:
                losses.append(F.cross_entropy(predicted[t], row[t + shift]))
    return torch.stack(losses).mean()


def plain_kl(task: Finetuning, ids: Tensor, expected: Tensor) -> Tensor:
    """Compute the divergence from a base, given its last hidden states."""
    head = task.model.get_output_embeddings()
    student = head(run_folded(task.model, ids, SEGMENT))[:, :-1].flatten(0, 1)
    teacher = task.predict.args[0].get_output_embeddings()(expected)[:, :-1].flatten(0, 1)
    log_p, log_q = (x.log_softmax(-1) for x in (student, teacher))
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


@both_families
@pytest.mark.parametrize("trainable", ["infini", "all"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_the_loss_is_the_weighted_sum_and_its_gradient_is_that_of_all_logits(
    family, trainable, kl_weight
):
    task = finetuning(family, trainable=trainable, kl_weight=kl_weight)
    ids = ids_of(task)
    want = (1 - kl_weight) * plain_loss(task, ids)
    if kl_weight:
        base = tiny_model(family)
        with torch.no_grad():
            segments, whole = run_folded(base, ids, SEGMENT), run_in_layer(base, ids)
        nll, want = want, want + kl_weight * plain_kl(task, ids, segments)
        assert abs(nll + kl_weight * plain_kl(task, ids, whole) - want) > 1e-3
    assert_same(task, task(ids)["loss"], want)


def test_the_teacher_stays_frozen_and_out_of_what_is_saved(tmp_path):
    task = finetuning(trainable="all", kl_weight=0.3)
    (base,) = task.predict.args
    before = {name: x.clone() for name, x in base.state_dict().items()}
    run(task, tmp_path, epochs=1, kl_weight=0.3)
    assert all(torch.equal(base.state_dict()[name], x) for name, x in before.items())
    assert not any(p.requires_grad for p in base.parameters())
    assert not {id(p) for p in task.parameters()} & {id(p) for p in base.parameters()}
    (row,) = [x for x in (tmp_path / "history.tsv").read_text().splitlines() if "train" in x]
    assert row.endswith("\t")  # no perplexity of a loss that is none


@both_families
@pytest.mark.parametrize("trainable", ["infini", "all"])
def test_each_position_learns_the_token_after_the_next_of_its_own_segment(family, trainable):
    task = finetuning(family, trainable=trainable, **TWICE)
    ids = ids_of(task)
    loss = task(ids)["loss"]
    assert_same(task, loss, plain_loss(task, ids, 2, across=False))
    for other in (plain_loss(task, ids, 2), plain_loss(task, ids, 1)):
        assert abs(other - loss) > 1e-3


@both_families
def test_it_is_the_loss_of_a_model_that_shifts_labels_which_were_shifted_already(family):
    task, base = finetuning(family, is_control=True, **TWICE), tiny_model(family)
    ids = ids_of(task)
    segments = ids.view(-1, SEGMENT)
    want = base(input_ids=segments[:, :-1], labels=segments[:, 1:]).loss
    assert task(ids)["loss"].item() == pytest.approx(want.item(), rel=1e-5)
    assert abs(base(input_ids=segments, labels=segments).loss - want) > 1e-3


def len_trained(task: Finetuning) -> int:
    return sum(p.numel() for group in task.groups.values() for p in group)


@both_families
def test_a_memory_that_trains_last_finds_the_rest_trained_as_its_control(family, tmp_path):
    over = {"trainable": "attention", "memory_documents": 2, "epochs": 2, "patience": 2}
    form = {"init": "base", "local": "softmax", "positions": "rope"}
    params, control = finetune_params(**over), finetuning(family, form, is_control=True, **over)
    val, documents = (ids_of(control, number) for number in (3, 4))
    paths = [tmp_path / name for name in ("control", "control.tsv")]
    train([(control, documents[:2])], val, params, *paths)
    model, infini = finetuning(family, form).model, replace(INFINI, **form)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    seen = []

    def noted() -> Iterator[tuple[Finetuning, Tensor]]:
        for part, ids in finetuning_parts(model, infini, params, documents, torch.float32):
            seen.append((part.params.trainable, part.read, ids))
            yield part, ids

    paths = [tmp_path / name for name in ("run", "run.tsv", "memory.tsv")]
    metrics = train(noted(), val, params, *paths)
    assert [entry[:2] for entry in seen] == [("attention", "off"), ("memory", "own")]
    assert torch.equal(torch.cat([entry[2] for entry in seen]), documents)
    after = model.state_dict()
    for name, x in control.model.state_dict().items():
        assert torch.allclose(after.pop(name), x, atol=1e-6), name
    assert after
    assert not any(torch.equal(x, before[name]) for name, x in after.items())
    assert (metrics["epochs_run"], metrics["num_trained_tokens"]) == (4, 2 * 4 * TOKENS)
    assert metrics["num_trainable_parameters"] == len_trained(control) + sum(
        x.numel() for name, x in model.named_parameters() if name in after
    )
    rows = (tmp_path / "run.tsv").read_text().splitlines()[1:]
    assert [row[:1] for row in rows] == list("011223344")


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"trainable": "memory", "memory_documents": 1}, "must be 0 when"),
        ({"trainable": "attention", "memory_documents": 4}, "less than finetune.train_documents"),
    ],
)
def test_a_part_with_nothing_to_train_is_refused(over, says):
    with pytest.raises(ValueError, match=says):
        finetune_params(**over)


def test_a_train_split_that_leaves_the_first_part_empty_is_refused():
    params = finetune_params(trainable="attention", memory_documents=3)
    ids = random_ids(64, 3, TOKENS)
    parts = finetuning_parts(tiny_llama(), INFINI, params, ids, torch.float32)
    with pytest.raises(ValueError, match="less than the 3 documents of the train split, got 3"):
        next(parts)


@both_families
@pytest.mark.parametrize("is_control", [False, True])
@pytest.mark.parametrize("label_shift", [1, 2])
def test_validation_is_the_protocols_own_numbers(family, is_control, label_shift):
    task = finetuning(family, is_control=is_control, label_shift=label_shift)
    model, ids = task.model, ids_of(task, 3)
    metrics = task.run_validation(ids)
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


@pytest.mark.parametrize("trainable", ["attention", "all", "lora"])
def test_a_base_without_infini_layers_trains_what_it_has(trainable, tmp_path):
    model, plain = tiny_llama(), replace(INFINI, layers=[])
    insert_infini(model, plain)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    params = {"trainable": trainable, "epochs": 1}
    task = Finetuning(model, plain, finetune_params(**params), torch.float32)
    run(task, tmp_path, **params)
    after = model.state_dict()
    changed = {name for name, x in before.items() if not torch.equal(after[name], x)}
    assert after.keys() == before.keys()
    assert changed == {n for n in before if "self_attn" in n or trainable == "all"}
