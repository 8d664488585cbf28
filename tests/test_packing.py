"""Rows of several documents, told apart by positions that start again: each as if alone."""

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from infini_retrofit.generation import generation
from tests.reference import largest
from tests.tiny_generation import at_once, draw_ids, every_case, filled, generating_model

NUM_TOKENS = (11, 1, 14, 6)
COLLATE = DataCollatorWithFlattening(
    return_tensors="pt", return_flash_attn_kwargs=True, return_seq_idx=True
)


def documents(seed: int = 0) -> list[Tensor]:
    return [draw_ids(1, n, seed=seed + n) for n in NUM_TOKENS]


def packed(texts: list[Tensor]) -> dict[str, Tensor]:
    """Pack documents into a row, as transformers does for training."""
    batch = COLLATE([{"input_ids": text[0]} for text in texts])
    return {name: x for name, x in batch.items() if name != "labels"}


@every_case
def test_documents_of_a_packed_row_are_computed_as_if_alone(family, other, form):
    model, texts = generating_model(family, other, **form).double(), documents()
    want = torch.cat([at_once(model, text) for text in texts], dim=1)
    batch = packed(texts)
    assert largest(at_once(model, batch.pop("input_ids"), **batch) - want) < 1e-9


def test_documents_that_leak_into_each_other_are_noticed(monkeypatch):
    model, batch = generating_model(), packed(documents())
    want = at_once(model, **{"ids": batch.pop("input_ids")}, **batch)
    monkeypatch.setattr(generation, "find_documents", lambda *args: None)
    got = at_once(model, packed(documents())["input_ids"], position_ids=batch["position_ids"])
    assert largest(got - want) > 1e-3


def test_rows_are_packed_each_for_itself_and_gradients_cross_no_border():
    model = generating_model()
    ids, positions = draw_ids(2, 12), torch.tensor([[*range(7), *range(5)], [*range(12)]])
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    output = model(inputs_embeds=embeds, position_ids=positions, output_hidden_states=True)
    assert [x.shape[:2] for x in output.hidden_states] == 4 * [(2, 12)]
    assert largest(output.logits[0, 7:] - at_once(model, ids[:1, 7:])[0]) < 1e-5
    output.logits[0, 7:].sum().backward()
    assert embeds.grad[0, :7].eq(0).all()
    assert embeds.grad[0, 7:].ne(0).any()


@pytest.mark.parametrize("beside", ["padding", "a cache", "borders alone"])
def test_packed_rows_that_cannot_be_told_apart_are_refused(beside):
    model, batch = generating_model(), packed(documents())
    if beside == "padding":
        batch |= {
            "attention_mask": torch.ones_like(batch["input_ids"]).index_fill(1, torch.tensor(31), 0)
        }
    if beside == "a cache":
        cache = filled(model, draw_ids(1, 4))
        batch |= {"past_key_values": cache, "position_ids": batch["position_ids"] + 4}
    if beside == "borders alone":
        del batch["position_ids"]
    with pytest.raises(ValueError, match=r"position_ids must (grow along|start again where)"):
        model(**batch)


def test_a_text_that_begins_again_in_a_filled_cache_is_refused():
    model = generating_model()
    cache, ids = filled(model, draw_ids(2, 7)), draw_ids(2, 3)
    for positions in (torch.arange(3), torch.tensor([[7, 8, 9], [6, 7, 8]])):
        with pytest.raises(ValueError, match=r"position_ids must go on after the \[7, 7\] tokens"):
            model(ids, position_ids=positions.expand(2, -1), past_key_values=cache)
    model(ids, position_ids=torch.tensor([[7, 8, 9]]), past_key_values=cache)
