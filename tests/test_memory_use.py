"""How the use of a memory is measured, against gates set by hand and a loop over queries."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.evaluation.evaluation import share_histogram
from infini_retrofit.layer.naive import NaiveLayer
from infini_retrofit.layer.probe import MemoryReading
from infini_retrofit.model.retrofit import infini_modules
from infini_retrofit.scoring import memory_use as module
from infini_retrofit.scoring.memory_use import memory_use, run_and_read
from infini_retrofit.scoring.score import Score, score_runs, score_segments, segment_runs, total
from tests.reference import both_families, infini_params, record_layers, retrofitted, set_share
from tests.tiny import ids_for

SEGMENT, DOCUMENT = 5, 15


def use_of(model: PreTrainedModel, ids: Tensor) -> dict[str, float]:
    runs, readings = run_and_read(model, ids, SEGMENT)
    return memory_use(model, ids, SEGMENT, total(score_runs(model, runs)), readings)


@both_families
@pytest.mark.parametrize("share", [0.02, 0.9])
def test_a_fixed_gate_is_the_share_of_every_query(family, share):
    model = retrofitted(family)
    set_share(model, share)
    used = use_of(model, ids_for(model, 3))
    shares = [used.pop(f"memory_share_{name}") for name in ("mean", "p05", "p50", "p95")]
    assert shares == [torch.sigmoid(torch.tensor(math.log(share / (1 - share)))).item()] * 4
    assert set(used) == {"recalled_over_local", "segment_val_ppl", "segment_off_val_ppl"}
    assert all(type(value) is float and math.isfinite(value) for value in used.values())


def test_shares_are_pooled_over_layers_heads_and_queries():
    model = retrofitted(layers=[0, 2])
    shares = torch.arange(1, 9) / 10  # of 2 layers with 4 heads each
    for layer, share in zip(infini_modules(model).values(), shares.split(4), strict=True):
        layer.gate_logit.data = torch.logit(share)
    used = use_of(model, ids_for(model, 3))
    assert used["memory_share_mean"] == pytest.approx(0.45)
    assert used["memory_share_p05"] == pytest.approx(0.1)
    assert 0.4 < used["memory_share_p50"] < 0.5
    assert used["memory_share_p95"] == pytest.approx(0.8)


@both_families
@pytest.mark.parametrize("num_documents", [1, 2, 3])
def test_readings_change_no_run_by_a_bit_and_perplexities_are_those_of_the_protocols(
    family, num_documents
):
    model = retrofitted(family)
    ids = ids_for(model, num_documents)
    runs = segment_runs(model, ids, SEGMENT)
    for got, want in zip(run_and_read(model, ids, SEGMENT)[0], runs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    own, off = (total(score_segments(model, ids, SEGMENT, read)) for read in ("own", "off"))
    used = use_of(model, ids)
    assert (used["segment_val_ppl"], used["segment_off_val_ppl"]) == (own.ppl, off.ppl)
    assert off.ppl != pytest.approx(own.ppl, rel=1e-3)


@both_families
def test_norms_are_those_of_a_loop_over_queries(family):
    params = infini_params(layers=[0])
    model = retrofitted(family, layers=[0])
    ids, recalled_norms, local_norms = ids_for(model, 2), [], []
    naive = NaiveLayer(infini_modules(model)[0], params)
    norm = model.base_model.layers[0].input_layernorm
    tables = model.base_model.rotary_emb(torch.zeros(1), torch.arange(DOCUMENT)[None])
    tables = tuple(table[0] for table in tables)
    for hidden_states in norm(record_layers(model, ids)["given"][0]):
        heads = naive.project(hidden_states)
        for h, t in product(range(len(heads.query)), range(SEGMENT, DOCUMENT)):
            n, begin = h // naive.group, t // SEGMENT * SEGMENT
            feature = naive.feature(heads.query[h, t], h, "query")
            numerator, denominator = naive.read(feature, naive.write(heads, n)[begin], n, t)
            recalled_norms.append((numerator / denominator).norm().item())
            local_norms.append(naive.attend_locally(heads, tables, h, t, begin).norm().item())
    used = use_of(model, ids)
    want = sum(recalled_norms) / sum(local_norms)
    assert used["recalled_over_local"] == pytest.approx(want, rel=1e-4)
    assert used["recalled_over_local"] != pytest.approx(1, rel=0.01)


def test_every_document_is_read_by_itself_but_for_its_first_segment():
    model = retrofitted()
    ids = ids_for(model, 5)
    together = run_and_read(model, ids, SEGMENT)[1]
    assert list(together) == [0, 1, 2]
    assert together[0].share.shape == (5, DOCUMENT // SEGMENT - 1, 4, SEGMENT)
    apart = [run_and_read(model, row[None], SEGMENT)[1][2] for row in ids]
    for name in ("share", "recalled_norm", "local_norm"):
        want = torch.cat([getattr(reading, name) for reading in apart])
        assert torch.allclose(getattr(together[2], name), want, rtol=1e-4)
        assert not getattr(together[2], name).requires_grad


@pytest.mark.parametrize("form", [{"layers": []}, {"memory": "off"}])
def test_a_model_without_memory_has_no_readings(form, monkeypatch):
    model = retrofitted(**form)
    ids = ids_for(model, 3)
    runs, readings = run_and_read(model, ids, SEGMENT)
    assert (len(runs), readings) == (3, {})
    assert share_histogram(readings) == []
    monkeypatch.setattr(module, "score_segments", lambda *_: pytest.fail("ran without a memory"))
    assert memory_use(model, ids, SEGMENT, Score(1.0, 1), readings) == {}


def test_documents_of_one_segment_have_nothing_to_recall():
    model = retrofitted()
    assert use_of(model, ids_for(model, 3)[:, :SEGMENT]) == {}


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
