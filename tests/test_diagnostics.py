"""What is said of a memory's use, against gates set by hand and a reading by hand."""

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.evaluation.protocols import share_histogram
from infini_retrofit.layer.naive import NaiveLayer, place_at
from infini_retrofit.layer.probe import MemoryReading
from infini_retrofit.model.families import FAMILIES
from infini_retrofit.model.retrofit import infini_modules, insert_infini
from infini_retrofit.model.running import run_folded
from infini_retrofit.scoring import memory_use as diagnostics
from infini_retrofit.scoring import score as perplexity
from infini_retrofit.scoring.memory_use import memory_use, read_memory
from infini_retrofit.scoring.score import score_segments, total
from tests.reference import infini_params, naive_attend, naive_recall, record_layers, set_share
from tests.tiny import random_ids, tiny_model

SEGMENT, DOCUMENT = 5, 15
NAMES = {
    *("memory_share_mean", "memory_share_p05", "memory_share_p50", "memory_share_p95"),
    *("recalled_over_local", "segment_val_ppl", "segment_off_val_ppl"),
}
both_families = pytest.mark.parametrize("family", sorted(FAMILIES))


def retrofitted(family: str, **over: object) -> PreTrainedModel:
    model = tiny_model(family)
    insert_infini(model, infini_params(**over))
    return model


def ids_for(model: PreTrainedModel, num_documents: int = 3) -> Tensor:
    return random_ids(model.config.vocab_size, num_documents, DOCUMENT)


@both_families
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_fixed_gate_is_the_share_of_every_query(family, share):
    model = retrofitted(family)
    set_share(model, share)
    used = memory_use(model, ids_for(model), SEGMENT)
    assert used.keys() == NAMES
    gate = torch.sigmoid(torch.tensor(math.log(share / (1 - share)))).item()
    for name in ("mean", "p05", "p50", "p95"):
        assert used[f"memory_share_{name}"] == gate
    assert all(type(value) is float and math.isfinite(value) for value in used.values())


def test_shares_are_pooled_over_layers_heads_and_queries():
    model = retrofitted("llama", layers=[0, 2])
    shares = torch.arange(1, 9) / 10  # of 2 layers with 4 heads each
    for module, share in zip(infini_modules(model).values(), shares.split(4), strict=True):
        module.gate_logit.data = torch.logit(share)
    used = memory_use(model, ids_for(model), SEGMENT)
    assert used["memory_share_mean"] == pytest.approx(0.45)
    assert used["memory_share_p05"] == pytest.approx(0.1)
    assert 0.4 < used["memory_share_p50"] < 0.5
    assert used["memory_share_p95"] == pytest.approx(0.8)


@both_families
def test_the_perplexities_are_those_of_the_protocols(family):
    model = retrofitted(family)
    ids = ids_for(model)
    off, own = (total(score_segments(model, ids, SEGMENT, read)) for read in ("off", "own"))
    used = memory_use(model, ids, SEGMENT)
    assert used["segment_off_val_ppl"] == off.ppl
    assert used["segment_val_ppl"] == pytest.approx(own.ppl, rel=1e-5)
    assert off.ppl != pytest.approx(own.ppl, rel=1e-3)


def test_both_take_one_pass_each_over_every_document(monkeypatch):
    model, lengths = retrofitted("llama"), []

    def spy(model: PreTrainedModel, ids: Tensor, *others: object, **named: object) -> Tensor:
        lengths.append(len(ids))
        return run_folded(model, ids, *others, **named)

    for module in (diagnostics, perplexity):
        monkeypatch.setattr(module, "run_folded", spy)
    memory_use(model, ids_for(model), SEGMENT)
    assert sum(lengths) == 2 * 3


@both_families
def test_norms_are_those_of_a_loop_over_queries(family):
    model = retrofitted(family, layers=[0])
    ids = ids_for(model, 2)
    recalled_norms, local_norms = [], []
    layer, notes = infini_modules(model)[0], record_layers(model, ids)
    norm = model.base_model.layers[0].input_layernorm
    tables = model.base_model.rotary_emb(torch.zeros(1), torch.arange(DOCUMENT)[None])
    tables = tuple(table[0] for table in tables)
    for hidden_states in norm(notes["given"][0]):
        heads = NaiveLayer(layer, infini_params()).project(hidden_states)
        for h in range(layer.shape.num_heads):
            n = h // (layer.shape.num_heads // layer.shape.num_kv_heads)
            for t in range(SEGMENT, DOCUMENT):
                begin = t // SEGMENT * SEGMENT
                past_key, past_value = heads.key[n, :begin], heads.value[n, :begin]
                recalled = naive_recall(heads.query[h, t], past_key, past_value)
                key = torch.stack(
                    [place_at(heads.key[n, s], s, tables) for s in range(begin, t + 1)]
                )
                query, value = place_at(heads.query[h, t], t, tables), heads.value[n, begin : t + 1]
                recalled_norms.append(recalled.norm().item())
                local_norms.append(naive_attend(query, key, value, "softmax").norm().item())
    used = memory_use(model, ids, SEGMENT)
    want = sum(recalled_norms) / sum(local_norms)
    assert used["recalled_over_local"] == pytest.approx(want, rel=1e-4)
    assert used["recalled_over_local"] != pytest.approx(1, rel=0.01)


def test_every_document_is_read_by_itself_but_for_its_first_segment():
    model = retrofitted("llama")
    ids = ids_for(model, 5)
    together = read_memory(model, ids, SEGMENT)
    assert list(together) == [0, 1, 2]
    assert together[0].share.shape == (5, DOCUMENT // SEGMENT - 1, 4, SEGMENT)
    apart = [read_memory(model, row[None], SEGMENT)[2] for row in ids]
    for name in ("share", "recalled_norm", "local_norm"):
        want = torch.cat([getattr(reading, name) for reading in apart])
        assert torch.allclose(getattr(together[2], name), want, rtol=1e-4)
        assert not getattr(together[2], name).requires_grad


WITHOUT = {
    "no layers": {"layers": []},
    "memory off": {"memory": "off"},
}


@pytest.mark.parametrize("form", WITHOUT)
def test_of_a_model_without_memory_nothing_is_said_and_nothing_runs(form, monkeypatch):
    model = retrofitted("llama", **WITHOUT[form])
    monkeypatch.setattr(diagnostics, "run_folded", lambda *_, **__: pytest.fail("ran"))
    assert memory_use(model, ids_for(model), SEGMENT) == {}
    assert share_histogram(read_memory(model, ids_for(model), SEGMENT)) == []


def test_documents_of_one_segment_have_nothing_to_recall():
    model = retrofitted("llama")
    assert memory_use(model, ids_for(model)[:, :SEGMENT], SEGMENT) == {}


def reading_of(*shares: float) -> MemoryReading:
    share = torch.tensor(shares).view(1, 1, 1, -1)
    return MemoryReading(share, torch.ones_like(share), torch.ones_like(share))


def test_the_histogram_counts_each_layer_s_shares_from_0_to_1():
    rows = share_histogram({2: reading_of(0.0, 0.01, 0.12, 0.97, 1.0), 5: reading_of(0.5)})
    assert [row["layer"] for row in rows] == [2] * 20 + [5] * 20
    assert [row["memory_share"] for row in rows[:20]] == pytest.approx([i / 20 for i in range(20)])
    filled = {(row["layer"], row["memory_share"]): row["share_of_pairs"] for row in rows}
    filled = {place: share for place, share in filled.items() if share}
    assert filled == {(2, 0.0): 0.4, (2, 0.1): 0.2, (2, 0.95): 0.4, (5, 0.5): 1.0}
    assert len(share_histogram({0: reading_of(0.5)}, num_bins=4)) == 4


def test_the_histogram_of_a_model_shows_its_gates():
    model = retrofitted("llama", layers=[1])
    set_share(model, 0.32)
    infini_modules(model)[1].gate_logit.data[:1] = torch.logit(torch.tensor(0.87))
    rows = share_histogram(read_memory(model, ids_for(model), SEGMENT))
    filled = {row["memory_share"]: row["share_of_pairs"] for row in rows if row["share_of_pairs"]}
    assert filled == {0.3: 0.75, 0.85: 0.25}
