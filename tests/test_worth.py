"""What far sight is worth by layer, what an untrained memory recalls, and what slots are worth."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from analysis import layers_worth, slots
from analysis.layers_worth import SEGMENT, layer_groups, score_documents
from analysis.recall import RULES, recall
from infini_retrofit.model.retrofit import infini_modules
from infini_retrofit.model.running import run_in_layer
from infini_retrofit.scoring.score import next_token_nlls
from infini_retrofit.texts.splits import Document
from tests.reference import MODEL_FORMS, make_model
from tests.tiny import ids_for, tiny_llama

T = 6 * SEGMENT


def test_far_sight_everywhere_is_full_attention_and_a_window_hides_what_is_far(monkeypatch):
    model = tiny_llama(max_position_embeddings=2 * T).eval()
    ids = torch.randint(model.config.vocab_size, (T,), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[1:SEGMENT] = 0  # the window keeps the document's first token
    texts = {"a": ids, "b": changed}
    documents = [Document(t, 0, x.numpy().astype(np.int32)) for t, x in texts.items()]
    far = 5 * SEGMENT  # each of three layers may look a segment further back
    monkeypatch.setattr(layers_worth, "BEGIN", far)
    every = range(model.config.num_hidden_layers)
    everywhere, nowhere = (score_documents(model, documents, layers, "") for layers in (every, []))
    hidden = run_in_layer(model, ids[None], segment_length=T)[0]
    expected = next_token_nlls(model, ids[far - 1 :], hidden[far - 1 :]).double().mean().item()
    assert everywhere["a"] == pytest.approx(expected, rel=1e-5)
    assert abs(everywhere["a"] - everywhere["b"]) > 1e-5
    assert nowhere["a"] == pytest.approx(nowhere["b"], rel=1e-6)


def test_the_groups_are_none_all_and_thirds():
    groups = layer_groups(6)
    assert groups["none"] == []
    assert groups["all"] == [*range(6)]
    assert (groups["0 to 1"], groups["2 to 5"], groups["5"]) == ([0, 1], [2, 3, 4, 5], [5])


@pytest.mark.parametrize("rule", RULES)
def test_a_memory_recalls_what_it_has_room_for(rule):
    """Ten contexts follow each other again and again; each has a key and a next token."""
    contexts = torch.arange(T) % 10
    words = torch.eye(16)
    key = 9 * F.one_hot(contexts, 16).float() - 9 * (1 - F.one_hot(contexts, 16).float())
    ids = (contexts * 7) % 16
    asked = torch.arange(3 * SEGMENT, T)
    arguments = (words[ids], asked, ids, words, rule)
    assert recall(key, *arguments, 16).double().mean() == 1
    assert recall(key, *arguments, 2).double().mean() < 0.5
    nowhere = torch.arange(1, SEGMENT)  # nothing has left the window yet
    early = recall(key, words[ids], nowhere, ids, words, rule, 16)
    assert early.double().mean() < 0.3


@torch.no_grad()
def test_fewer_slots_change_a_score_once_a_document_does_not_fit(monkeypatch):
    form = next(form for form in MODEL_FORMS if form.get("update_rule") == "neural_cache")
    model = make_model("llama", form, torch.float32)
    (cache,) = (m for m in infini_modules(model).values() if m.memory)
    ids, length = ids_for(model), cache.segment_length
    scores = {}
    for num_slots in (100, ids.shape[1], length):
        cache.memory.num_slots = num_slots
        scores[num_slots] = slots.score(model, ids, length)
    assert (scores[100] - scores[ids.shape[1]]).abs().max() < 1e-6
    assert (scores[100] - scores[length]).abs().min() > 1e-5
    cache.memory.num_slots = 100
    monkeypatch.setattr(slots, "BYTES", (160, 10**6))
    assert slots.slots_of(cache) == [10, 100]  # 6 features in 16 bits and an id: 16 bytes
