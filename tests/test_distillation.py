"""Distilling: its targets, and that it goes towards them."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import WEIGHTS, check_layers, load_retrofit, save_retrofit
from infini_retrofit.model.families import decoder_layers
from infini_retrofit.model.retrofit import infini_modules
from infini_retrofit.model.running import run_in_layer
from infini_retrofit.scoring.score import score_rows, total
from infini_retrofit.training.distillation import Distillation
from infini_retrofit.training.loop import train
from tests.reference import infini_params, largest, record_layers
from tests.tiny import FAMILIES, random_ids, tiny_base_folder, tiny_llama, tiny_model
from tests.tiny_training import INFINI, TOKENS, distill_params

OBJECTIVES = ["layer_output", "attention_output", "logit_kl"]


def distillation(form: dict | None = None, family: str = "llama", **over: object) -> Distillation:
    infini = replace(INFINI, **form or {})
    return Distillation(tiny_model(family), infini, distill_params(**over), torch.float32)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_distilling_lowers_the_loss_and_needs_no_teacher_in_its_checkpoint(tmp_path, objective):
    params = distill_params(objective=objective, epochs=8)
    trainee = Distillation(tiny_llama(), INFINI, params, torch.float32)
    assert set(trainee.state_dict()) == {
        name for name, p in trainee.named_parameters() if p.requires_grad
    }
    samples = random_ids(67, 6, 32), random_ids(67, 2, 32, seed=1)
    before = trainee.validate(samples[1])["val_loss"]
    history = tmp_path / "history.tsv"
    metrics = train(trainee, *samples, params, tmp_path / "run", history)
    assert metrics["val_loss"] < 0.9 * before
    assert "\t\n" in history.read_text()  # no perplexity of an MSE


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_distilling_targets_are_the_base_s_own_outputs(objective):
    params, ids = distill_params(objective=objective), random_ids(67, 2, 32)
    exact = infini_params(memory="off", segment_length=32)
    assert Distillation(tiny_llama(), exact, params, torch.float32)(ids)["loss"].abs() < 1e-6
    for different in (replace(exact, segment_length=8), replace(INFINI, layers="all")):
        assert Distillation(tiny_llama(), different, params, torch.float32)(ids)["loss"] > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_given_what_the_base_s_was_given_not_what_another_student_returned(family):
    params = distill_params()
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
    trainee = Distillation(tiny_llama(), INFINI, distill_params(), torch.float32)
    rows = random_ids(67, 3, 32)
    with torch.no_grad():
        metrics = trainee.validate(rows)
        losses = [trainee(row[None])["loss"].item() for row in rows]
    assert metrics["val_loss"] == pytest.approx(sum(losses) / 3)
    assert metrics["val_ppl"] == pytest.approx(total(score_rows(trainee.model, rows)).ppl)
    assert metrics["val_ppl"] != pytest.approx(total(score_rows(tiny_llama(), rows)).ppl, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_divergence_is_the_plain_one_at_every_position_and_so_is_its_gradient(family):
    trainee = distillation({"layers": [0, 2]}, family, objective="logit_kl")
    ids = random_ids(trainee.model.config.vocab_size, 2, TOKENS)
    with torch.no_grad():
        expected = tiny_model(family)(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    head = trainee.model.get_output_embeddings()
    logits = head(run_in_layer(trainee.model, ids)).log_softmax(-1)
    want = (expected.exp() * (expected - logits)).sum(-1).mean()
    got = trainee(ids)["loss"]
    assert got.item() == pytest.approx(want.item(), rel=1e-4)
    trained = [p for p in trainee.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(x, trained, allow_unused=True) for x in (got, want)]
    for one, other in zip(*gradients, strict=True):
        assert largest(one - other) < 1e-4 * max(1, largest(other))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_branch_beside_the_base_is_asked_for_what_a_segment_alone_misses(family, objective):
    form = {"layers": "all", "local": "softmax", "positions": "rope", "init": "base"}
    branch = distillation(form | {"insertion": "parallel"}, family, objective=objective)
    confined = distillation(form | {"memory": "off"}, family, objective=objective)
    ids = random_ids(branch.model.config.vocab_size, 2, TOKENS)
    loss = branch(ids)["loss"]
    if objective != "logit_kl":
        assert loss.item() == pytest.approx(confined(ids)["loss"].item(), rel=1e-4)
    loss.backward()
    for module in infini_modules(branch.model).values():
        assert loss > 1e-3 < module.alpha.grad.abs() * 1e3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_memory_alone_trains_what_a_base_has_no_counterpart_of(objective, tmp_path):
    form = {"insertion": "parallel", "feature_map": "hedgehog"}
    trainee = distillation(form, objective=objective, trainable="memory")
    own = infini_modules(trainee.model)[0].memory_parameters()
    want = {id(p) for parameters in own.values() for p in parameters}
    assert {id(p) for p in trainee.parameters() if p.requires_grad} == want
    assert [len(trainee.groups[name]) for name in ("infini", "rest")] == [0, 0]
    assert all(trainee.groups[name] for name in ("gate", "alpha", "memory"))


def run_distillation(trainee: Distillation, folder, **over: object) -> dict:
    samples = random_ids(67, 6, TOKENS), random_ids(67, 2, TOKENS, seed=1)
    params = distill_params(**over)
    return train(trainee, *samples, params, folder / "run", folder / "h.tsv", folder / "m.tsv")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_epochs_the_layers_are_inserted_and_nothing_is_fitted(objective, tmp_path, capsys):
    base_dir = tiny_base_folder(tmp_path / "base", vocab_size=67)
    over = {"objective": objective, "epochs": 0}
    trainee = Distillation(
        load_base(base_dir, torch.float32), INFINI, distill_params(**over), torch.float32
    )
    want = trainee.run_validation(random_ids(67, 2, TOKENS, seed=1))
    metrics = run_distillation(trainee, tmp_path, **over)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "distill: nothing is trained, because its epochs are 0"
    assert (metrics["val_loss"], metrics["val_ppl"]) == (want["val_loss"], want["val_ppl"])
    assert metrics["val_loss"] > 1e-3
    counts = ("best_epoch", "epochs_run", "num_trained_tokens")
    assert [metrics[name] for name in counts] == [0, 0, 0]
    assert "memory_share_mean\t" in (tmp_path / "m.tsv").read_text()
    save_retrofit(trainee.model, INFINI, base_dir, tmp_path / "out")
    loaded, infini = load_retrofit(base_dir, tmp_path / "out", torch.float32)
    assert infini == INFINI
    assert list(infini_modules(loaded)) == [0]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("trainable", ["memory", "infini"])
def test_the_plain_base_goes_through_with_nothing_to_do(objective, trainable, tmp_path, capsys):
    base_dir = tiny_base_folder(tmp_path / "base", vocab_size=67)
    plain, over = replace(INFINI, layers=[]), {"objective": objective, "trainable": trainable}
    base = load_base(base_dir, torch.float32)
    trainee = Distillation(base, plain, distill_params(**over), torch.float32)
    metrics = run_distillation(trainee, tmp_path, **over)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "distill: nothing is trained, because no parameter is to train"
    val = random_ids(67, 2, TOKENS, seed=1)
    want = total(score_rows(load_base(base_dir, torch.float32), val)).ppl
    assert metrics["val_ppl"] == pytest.approx(want)
    assert metrics["val_loss"] == pytest.approx(0, abs=1e-6)
    assert metrics["num_trainable_parameters"] == 0
    assert (tmp_path / "m.tsv").read_text() == "epoch\tquantity\tvalue\n"
    save_retrofit(trainee.model, plain, base_dir, tmp_path / "out")
    assert load_file(tmp_path / "out" / WEIGHTS) == {}
    loaded, infini = load_retrofit(base_dir, tmp_path / "out", torch.float32)
    assert infini == plain
    assert total(score_rows(loaded, val)).ppl == pytest.approx(want)


def test_layers_that_the_base_does_not_have_are_refused_by_its_configuration(tmp_path):
    base_dir = tiny_base_folder(tmp_path / "base")
    for layers in ([], [0, -1], "all"):
        check_layers(replace(INFINI, layers=layers), base_dir)
    with pytest.raises(ValueError, match=r"infini\.layers must be in -3\.\.2 .* got 3"):
        check_layers(replace(INFINI, layers=[3]), base_dir)
    check_layers(replace(INFINI, layers=[3]), tmp_path / "none")
