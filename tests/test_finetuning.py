"""The objective of fine-tuning: its plain formula, its teacher, its pieces, and the control."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infini_retrofit.model.retrofit import insert_infini
from infini_retrofit.model.running import run_folded, run_in_layer
from infini_retrofit.scoring.score import score_segments, total
from infini_retrofit.training.control import ControlParams, make_control
from infini_retrofit.training.finetuning import Finetuning, check_trainable
from tests.reference import largest
from tests.tiny import FAMILIES, random_ids, tiny_llama, tiny_model
from tests.tiny_training import (
    INFINI,
    NUM_SEGMENTS,
    SEGMENT,
    TOKENS,
    finetune_params,
    finetuning,
    run,
)

KL = {"kl_weight": 0.3}


def ids_of(trainee: Finetuning, num_documents: int = 2) -> Tensor:
    return random_ids(trainee.model.config.vocab_size, num_documents, TOKENS, seed=2)


def plain_loss(trainee: Finetuning, ids: Tensor, base: torch.nn.Module, context: str) -> Tensor:
    """Compute the loss from all logits at once."""
    kl_weight, head = trainee.params.kl_weight, trainee.model.get_output_embeddings()
    logits = head(run_folded(trainee.model, ids, SEGMENT))[:, :-1].flatten(0, 1)
    with torch.no_grad():
        seen = run_folded(base, ids, SEGMENT) if context == "segment" else run_in_layer(base, ids)
        expected = base.get_output_embeddings()(seen)[:, :-1].flatten(0, 1)
    nll = F.cross_entropy(logits, ids[:, 1:].flatten())
    kl = F.kl_div(
        logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    return (1 - kl_weight) * nll + kl_weight * kl


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("context", ["segment", "document"])
@pytest.mark.parametrize("trainable", ["infini", "all"])
def test_the_loss_is_the_weighted_sum_and_its_gradient_is_that_of_all_logits(
    family, context, trainable
):
    trainee = finetuning(family, trainable=trainable, kl_context=context, **KL)
    ids, trained = ids_of(trainee), [p for p in trainee.parameters() if p.requires_grad]
    losses = [trainee(ids)["loss"], plain_loss(trainee, ids, tiny_model(family), context)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    other = {"segment": "document", "document": "segment"}[context]
    assert abs(plain_loss(trainee, ids, tiny_model(family), other) - losses[0]) > 1e-3
    gradients = [torch.autograd.grad(loss, trained, allow_unused=True) for loss in losses]
    for one, want in zip(*gradients, strict=True):
        assert (one is None) == (want is None)
        assert want is None or largest(one - want) < 1e-4 * max(1, largest(want))


def test_without_a_weight_there_is_no_teacher_and_the_loss_is_cross_entropy():
    trainee = finetuning()
    ids = ids_of(trainee)
    logits = trainee.model.get_output_embeddings()(run_folded(trainee.model, ids, SEGMENT))
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert trainee.teacher is None
    assert trainee(ids)["loss"].item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_confined_to_segments_does_not_diverge_from_itself(family):
    params, model = finetune_params(kl_weight=1.0, trainable="all"), tiny_model(family)
    make_control(model, INFINI)
    control = Finetuning(model, INFINI, params, torch.float32, tiny_model(family))
    assert abs(control(ids_of(control))["loss"].item()) < 1e-5
    other = replace(params, kl_context="document")
    control = Finetuning(model, INFINI, other, torch.float32, tiny_model(family))
    assert control(ids_of(control))["loss"].item() > 0.01


def test_the_teacher_stays_frozen_and_out_of_what_is_saved(tmp_path):
    trainee = finetuning(trainable="all", **KL)
    before = {name: x.clone() for name, x in trainee.teacher.base.state_dict().items()}
    run(trainee, tmp_path, epochs=1, **KL)
    after = trainee.teacher.base.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert not any(p.requires_grad for p in trainee.teacher.base.parameters())
    assert all(p is not q for p in trainee.parameters() for q in trainee.teacher.base.parameters())
    rows = (tmp_path / "history.tsv").read_text().splitlines()
    assert [row.split("\t")[3] == "" for row in rows if "train" in row] == [True]


def test_the_divergence_keeps_a_model_nearer_to_its_base(tmp_path):
    kls = []
    for kl_weight in (0.0, 0.9):
        trainee = finetuning(trainable="all", kl_weight=kl_weight)
        run(trainee, tmp_path / str(kl_weight), kl_weight=kl_weight, epochs=2)
        judge = Finetuning(
            trainee.model, INFINI, finetune_params(kl_weight=1.0), torch.float32, tiny_llama()
        )
        kls.append(judge(ids_of(judge))["loss"].item())
    assert kls[1] < 0.9 * kls[0]


def pieces_of(trainee: Finetuning, num_steps: int = 9) -> list[int]:
    """Return of how many segments the pieces of each step are."""
    trainee.num_steps, lengths, ids = num_steps, [], ids_of(trainee)
    for trainee.step in range(num_steps):
        pieces = trainee._pieces(ids)
        assert torch.equal(pieces.flatten(), ids.flatten())
        lengths.append(pieces.shape[1] // SEGMENT)
    return lengths


def test_steps_take_the_pieces_that_the_parameters_ask_for():
    assert set(pieces_of(finetuning(num_segments="all"))) == {NUM_SEGMENTS}
    assert pieces_of(finetuning(num_segments="curriculum")) == [2] * 6 + [NUM_SEGMENTS] * 3
    drawn = [pieces_of(finetuning(num_segments="random", seed=seed)) for seed in (0, 0, 1)]
    assert set(drawn[0]) == {2, NUM_SEGMENTS}
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_piece_is_a_document_of_its_own_and_validation_sees_whole_ones():
    trainee = finetuning(num_segments="curriculum")
    ids = ids_of(trainee)
    whole = finetuning()
    cut = ids.reshape(-1, 2 * SEGMENT)
    assert trainee(ids)["loss"].item() == pytest.approx(whole(cut)["loss"].item(), rel=1e-6)
    assert trainee(ids)["loss"].item() != pytest.approx(whole(ids)["loss"].item(), rel=1e-3)
    assert trainee.run_validation(ids) == whole.run_validation(ids)
    assert trainee(ids)["loss"].item() == pytest.approx(whole(ids)["loss"].item(), rel=1e-6)


def test_a_killed_run_goes_on_with_the_pieces_it_would_have_had(tmp_path, monkeypatch):
    over = {"num_segments": "random", "epochs": 2}

    def start(folder: str, steps_to_live: int) -> tuple[dict, list[int]]:
        trainee, shapes, steps = finetuning(**over), [], iter(range(steps_to_live))
        cut = trainee._pieces

        def mortal(documents: Tensor) -> Tensor:
            if next(steps, None) is None:
                raise KeyboardInterrupt
            pieces = cut(documents)
            shapes.append(pieces.shape[1] // SEGMENT)
            return pieces

        monkeypatch.setattr(trainee, "_pieces", mortal)
        try:
            return run(trainee, tmp_path / folder, **over), shapes
        except KeyboardInterrupt:
            return {}, shapes

    whole, drawn = start("whole", 99)
    assert start("killed", 6) == ({}, drawn[:6])
    assert start("killed", 99) == (whole, drawn[4:])
    assert set(drawn[4:]) == {2, NUM_SEGMENTS}
    assert whole["num_trained_tokens"] == 2 * 4 * TOKENS


def test_the_control_is_the_base_confined_to_segments():
    model, ids = tiny_llama(), random_ids(67, 2, TOKENS)
    want = total(score_segments(tiny_llama(), ids, SEGMENT))
    control = make_control(model, INFINI)
    assert control.memory == "off"
    assert total(score_segments(model, ids, SEGMENT)).nll == pytest.approx(want.nll, rel=1e-6)
    groups = Finetuning(model, INFINI, finetune_params(), torch.float32).groups
    assert not groups["gate"]
    assert len(groups["infini"]) == 4


def test_the_control_trains_as_the_retrofit_does_but_for_what_its_own_section_says():
    params = finetune_params(trainable="memory", lr=1e-2)
    assert ControlParams(trainable="same", lr="same").applied_to(params) == params
    own = ControlParams(trainable="attention", lr=1e-4).applied_to(params)
    assert own == finetune_params(trainable="attention", lr=1e-4) != params
    with pytest.raises(ValueError, match=r"finetune_control\.lr must be same or above 0, got 0"):
        ControlParams(trainable="same", lr=0.0)


def test_the_control_trains_the_same_layers_as_a_retrofit_of_whole_layers():
    infini = replace(INFINI, init="random_layer")
    model = tiny_llama()
    make_control(model, infini)
    trainee = Finetuning(model, infini, finetune_params(), torch.float32)
    names = {name for name, p in trainee.named_parameters() if p.requires_grad}
    assert any("mlp" in name for name in names)
    assert all(".layers.0." in name for name in names)


def test_the_control_sees_the_same_tokens_in_the_same_pieces(tmp_path):
    over = {"num_segments": "random", "kl_weight": 0.5, "trainable": "lora"}
    model = tiny_llama()
    make_control(model, INFINI)
    control = Finetuning(model, INFINI, finetune_params(**over), torch.float32, tiny_llama())
    retrofit = finetuning(**over)
    assert pieces_of(control) == pieces_of(retrofit)
    metrics = [run(t, tmp_path / str(i), **over) for i, t in enumerate((control, retrofit))]
    assert metrics[0]["num_trained_tokens"] == metrics[1]["num_trained_tokens"] == 3 * 4 * TOKENS


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
    assert (tmp_path / "memory.tsv").read_text().count("\n") == 1
