"""The rivals that `eval.rivals` names, each against a plain loop: selected, pointer, dynamic."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from infini_retrofit.evaluation import dynamic, pointer
from infini_retrofit.evaluation.costs import pointer_tokens, rival_costs
from infini_retrofit.evaluation.dynamic import adapted_modules, choose_lr, dynamic_runs
from infini_retrofit.evaluation.evaluation import evaluate
from infini_retrofit.evaluation.protocols import EvalParams, Setting, protocols_of, score_protocols
from infini_retrofit.evaluation.rival import Rival, make_rival, make_selected, make_windowed
from infini_retrofit.layer.cut import rotate
from infini_retrofit.model.families import decoder_layers
from infini_retrofit.model.retrofit import attention_modules
from infini_retrofit.model.running import run_folded
from infini_retrofit.pipeline import tokens
from infini_retrofit.scoring.score import next_token_nlls, segment_runs
from infini_retrofit.training.control import make_control
from tests.reference import both_families, infini_params, largest
from tests.tiny import ids_for, random_ids, tiny_llama, tiny_model

SEGMENT, DOCUMENT = 5, 20
RIVALS = ["selected", "pointer", "dynamic"]


def rival_of_sizes(local_context: int, num_selected: int) -> Rival:
    num_tokens, layers = local_context + num_selected, [0, 1, 2] if local_context else []
    return Rival(
        segment_length=SEGMENT, num_tokens=num_tokens, local_context=local_context, layers=layers
    )


def select_by_loop(
    module: nn.Module, hidden: Tensor, tables: tuple[Tensor, Tensor], num_window: int, num_kept: int
) -> Tensor:
    """Attend with each query of a document (T, D) to what its head has in reach then."""
    heads, kv_heads, size = (
        getattr(module.shape, name) for name in ("num_heads", "num_kv_heads", "head_dim")
    )
    own = module.own
    query, key, value = (
        p(hidden).view(len(hidden), -1, size) for p in (own.q_proj, own.k_proj, own.v_proj)
    )
    cos, sin = tables
    out = torch.zeros_like(query)
    for head in range(kv_heads):
        group = [h for h in range(heads) if h // (heads // kv_heads) == head]
        mass, kept = dict.fromkeys(range(len(hidden)), 0.0), set()
        for begin in range(0, len(hidden), SEGMENT):
            start = max(begin - num_window, 0)
            window = {t: t for t in range(start, begin)}  # the place of each token
            if start and window:
                del window[start]
                window[0] = start
            for t in range(begin, begin + SEGMENT):
                places = {k: k for k in kept} | window | {k: k for k in range(begin, t + 1)}
                for h in group:
                    q = rotate(query[t, h], cos[t], sin[t])
                    scores = torch.stack(
                        [q @ rotate(key[k, head], cos[p], sin[p]) for k, p in places.items()]
                    )
                    weights = (scores / size**0.5).softmax(0)
                    for k, weight in zip(places, weights, strict=True):
                        mass[k] += weight.item()
                        out[t, h] += weight * value[k, head]
            end = begin + SEGMENT
            next_window = set(range(max(end - num_window, 0), end)) if num_window else set()
            if end > num_window > 0:
                next_window = next_window - {end - num_window} | {0}
            reach = kept | set(window) | set(range(begin, end))
            kept = set(sorted(reach - next_window, key=lambda k: -mass[k])[:num_kept])
    return module.own.o_proj(out.flatten(1))


@both_families
@pytest.mark.parametrize(("num_window", "num_kept"), [(0, 3), (4, 2), (1, 4), (7, 3), (10, 2)])
@torch.no_grad()
def test_selected_tokens_are_those_of_a_loop_over_tokens_and_heads(family, num_window, num_kept):
    base = tiny_model(family).double()
    made = make_selected(base, rival_of_sizes(num_window, num_kept))
    inputs = []
    module = attention_modules(made)[1]
    module.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(
            (kwargs["hidden_states"] if not args else args[0], kwargs["position_embeddings"])
        ),
        with_kwargs=True,
    )
    outputs = []
    module.register_forward_hook(lambda *args: outputs.append(args[-1][0]))
    run_folded(made, ids_for(base, 2, DOCUMENT), SEGMENT)
    hidden, tables = inputs[0][0].view(2, DOCUMENT, -1), inputs[0][1]
    tables = [x.expand(8, -1, -1).reshape(2, DOCUMENT, -1)[0] for x in tables]
    want = torch.stack(
        [select_by_loop(module, row, tables, num_window, num_kept) for row in hidden]
    )
    got = outputs[0].view(2, DOCUMENT, -1)
    assert largest(got - want) < 1e-9
    recent = torch.stack([select_by_loop(module, row, tables, num_window, 0) for row in hidden])
    assert largest(got - recent) > 1e-3


@both_families
@pytest.mark.parametrize("num_window", [0, 1, 4, 10])
@torch.no_grad()
def test_without_selected_tokens_the_window_is_that_of_the_recent_rival(family, num_window):
    base, rival = tiny_model(family).double(), rival_of_sizes(num_window, 0)
    ids = ids_for(base, 2, DOCUMENT)
    want = run_folded(make_rival(base, rival), ids, SEGMENT)
    assert largest(run_folded(make_selected(base, rival), ids, SEGMENT) - want) < 1e-9
    all_kept = run_folded(make_selected(base, rival_of_sizes(0, DOCUMENT)), ids, SEGMENT)
    assert largest(all_kept - base.base_model(ids).last_hidden_state) < 1e-9


@both_families
@torch.no_grad()
def test_a_base_is_confined_to_the_window_of_the_retrofit_and_stays_as_it_is(family):
    base, rival = tiny_model(family), replace(rival_of_sizes(3, 2), layers=[0, 2])
    ids = ids_for(base, 2, DOCUMENT)
    control, before = tiny_model(family), run_folded(base, ids, SEGMENT)
    make_control(control, infini_params(layers=[0, 2], local_context=3))
    windowed = run_folded(make_windowed(base, rival), ids, SEGMENT)
    assert torch.equal(windowed, run_folded(control, ids, SEGMENT))
    assert torch.equal(run_folded(base, ids, SEGMENT), before)
    assert make_windowed(base, rival_of_sizes(0, 2)) is base
    assert make_windowed(control, rival) is control


def propose_by_force(ids: list[int], at: int, num_stored: int) -> tuple[int, int]:
    """Try every length and every place, the longest and most recent first."""
    segment = (at - 1) // SEGMENT * SEGMENT
    behind_window = range(segment - 3)[-num_stored:] if num_stored else range(0)
    for length in range(4, 0, -1):
        for follows in reversed(behind_window[length:]):
            if length <= at and ids[follows - length : follows] == ids[at - length : at]:
                return length, ids[follows]
    return 0, -1


@pytest.mark.parametrize("num_stored", [0, 1, 2, 9, 100])
def test_the_pointer_proposes_what_a_search_by_force_finds(num_stored):
    ids = random_ids(3, 60)
    want = [propose_by_force(ids.tolist(), at, num_stored) for at in range(1, 60)]
    stored = pointer.Stored(segment_length=SEGMENT, window=3, num_stored=num_stored)
    lengths, proposals = stored.longest_matches(ids)
    assert list(zip(lengths.tolist(), proposals.tolist(), strict=True)) == want
    assert lengths.max() == (4 if num_stored > 4 else max(num_stored - 1, 0))


def all_rivals(model: PreTrainedModel, documents: Tensor, val_documents: Tensor) -> Setting:
    params = EvalParams(
        window=11, stride=4, sliding_tokens=47, documents=2, rivals=RIVALS
    )
    text = tokens.TestText(documents[0], documents, ["a", "b"])
    return Setting(params, text, rival_of_sizes(3, 2), val_documents)


def test_pointer_scores_do_not_see_the_future_and_weights_not_the_test_split():
    model = tiny_llama(vocab_size=7)
    documents, val = random_ids(7, 2, DOCUMENT), random_ids(7, 2, DOCUMENT, seed=1)
    names = ["segment", "segment_pointer"]

    def scores(documents: Tensor, val: Tensor) -> Tensor:
        found = score_protocols(model, all_rivals(model, documents, val), names)
        return torch.stack(found["segment_pointer"])

    before, changed = scores(documents, val), documents.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 7
    after = scores(changed, val)
    # Token 12 is the first that differs: it is scored differently, those before are not.
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])
    assert not torch.equal(before, scores(documents, val.flip(1)))


def test_pointer_weights_are_the_most_likely_and_mix_as_the_formula_says():
    generator = torch.Generator().manual_seed(0)
    nlls = torch.rand(2, 400, generator=generator) * 3
    lengths = torch.randint(4, (2, 400), generator=generator)
    is_hit = torch.rand(2, 400, generator=generator) < 0.2 * lengths
    is_hit[lengths == 1] = False
    weights = pointer.fit_weights(nlls, lengths, is_hit)
    assert weights[[0, 1, 4]].tolist() == pytest.approx([0, 0, 0])
    for length in (2, 3):
        p, hit = nlls[lengths == length].double().neg().exp(), is_hit[lengths == length]
        grid = torch.linspace(0, 0.999, 1000, dtype=torch.float64)[:, None]
        best = ((1 - grid) * p + grid * hit).log().sum(1).argmax()
        assert weights[length].item() == pytest.approx(grid[best].item(), abs=1e-3)
        assert 0.05 < weights[length] < 0.95
    mixed = pointer.mix(nlls, lengths, is_hit, weights)
    w = weights[lengths]
    assert mixed.tolist() == pytest.approx(-((1 - w) * (-nlls.double()).exp() + w * is_hit).log())
    assert torch.equal(mixed[lengths < 2], nlls[lengths < 2])


def test_a_segment_is_scored_before_the_step_that_learns_from_it():
    base, rival, lr = tiny_model("llama").double(), rival_of_sizes(3, 2), 0.07
    ids, model = ids_for(base, 2, 2 * SEGMENT), make_windowed(base, rival)
    runs = list(dynamic_runs(model, ids, SEGMENT, lr))
    plain = run_folded(model, ids, SEGMENT)
    (module,) = adapted_modules(model)
    assert module is decoder_layers(model)[2].mlp.down_proj
    for row, (document, hidden) in enumerate(runs):
        assert torch.equal(document, ids[row])
        assert largest(hidden[:SEGMENT] - plain[row, :SEGMENT]) < 1e-9
        # The step by hand: up starts at zero, so that only it has a gradient.
        down = dynamic.make_adapters([module], 1)[0].down[0].double()
        up = torch.zeros(module.out_features, dynamic.RANK, dtype=torch.double, requires_grad=True)
        handle = module.register_forward_hook(lambda _, x, out: out + x[0] @ down.T @ up.T)  # noqa: B023
        states = run_folded(model, ids[row : row + 1, :SEGMENT], SEGMENT)[0]
        logits = model.get_output_embeddings()(states)
        loss = F.cross_entropy(logits[:-1], ids[row, 1:SEGMENT])
        (grad,) = torch.autograd.grad(loss, up)
        up.data -= lr * grad / (grad.abs() + 1e-8)  # the first step of Adam
        with torch.no_grad():
            after = run_folded(model, ids[row : row + 1], SEGMENT)[0, SEGMENT:]
        handle.remove()
        assert largest(hidden[SEGMENT:] - after) < 1e-5
        assert largest(after - plain[row, SEGMENT:]) > 1e-3


def test_dynamic_evaluation_leaves_the_model_as_it_is_and_takes_the_best_rate(monkeypatch):
    model = tiny_model("gpt_neox")
    ids = ids_for(model, 2, DOCUMENT)
    before, wants = run_folded(model, ids, SEGMENT), [p.requires_grad for p in model.parameters()]
    monkeypatch.setattr(dynamic, "LEARNING_RATES", (3.0, 1e-4, 10.0))
    assert choose_lr(model, ids, SEGMENT) == 1e-4
    assert torch.equal(run_folded(model, ids, SEGMENT), before)
    assert [p.requires_grad for p in model.parameters()] == wants
    assert all(p.grad is None for p in model.parameters())


def test_rivals_are_scored_only_where_they_are_named():
    params = EvalParams(window=11, stride=4, sliding_tokens=47, documents=2, rivals=["pointer"])
    more = {name: set(protocols_of(name, params)) for name in ("base", "distilled", "finetuned")}
    none = replace(params, rivals=[])
    for name, found in more.items():
        added = set() if name == "distilled" else {"segment_pointer"}
        assert found - set(protocols_of(name, none)) == added


@both_families
def test_the_base_s_report_has_every_rival_and_what_it_costs(family):
    model = tiny_model(family)
    setting = all_rivals(model, random_ids(7, 2, DOCUMENT), random_ids(7, 2, DOCUMENT, seed=1))
    metrics = evaluate("base", model, setting).metrics
    windowed, rival = make_windowed(model, setting.rival), setting.rival
    assert metrics["dynamic_lr"] in dynamic.LEARNING_RATES
    for name in ("selected", "pointer", "dynamic"):
        assert metrics[f"segment_{name}_test_ppl"] != metrics["segment_test_ppl"]
    heads, size, kv_heads = {"llama": (4, 6, 2), "gpt_neox": (3, 10, 3)}[family]
    token = 3 * 2 * kv_heads * size * 2
    inputs, outputs = {"llama": (37, 24), "gpt_neox": (53, 30)}[family]
    head = model.get_output_embeddings().weight.numel()
    assert {k: v for k, v in metrics.items() if k.endswith(("operations", "_state_bytes"))} == {
        "kv_state_bytes": 5 * token,
        "kv_operations": 2 * 2 * 3 * heads * size,
        "selected_state_bytes": 5 * (token + 3 * kv_heads * 4),
        "selected_operations": 2 * 2 * 3 * heads * size + 3 * heads * (5 + 3),
        "pointer_state_bytes": 3 * token + 2 * DOCUMENT,
        "pointer_operations": 6,
        "dynamic_state_bytes": 3 * token + 8 * (inputs + outputs) * 4 * 3,
        "dynamic_operations": 3 * 8 * (inputs + outputs) + head,
    }
    assert pointer_tokens(model, rival) == token
    assert "pointer_operations" not in rival_costs(model, rival, ["dynamic"], DOCUMENT)
    run = next(segment_runs(windowed, setting.text.documents, SEGMENT))
    found = score_protocols(model, setting, ["segment"])["segment"]
    assert torch.equal(found[0], next_token_nlls(windowed, *run))
