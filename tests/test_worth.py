"""What far sight is worth by layer, what an untrained memory recalls, what its size is worth."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from analysis import layers_worth, sizes
from analysis.layers_worth import SEGMENT, layer_groups, score_documents
from analysis.programs import open_documents, open_model
from analysis.recall import RULES, recall
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.model.running import run_in_layer
from infini_retrofit.pipeline.params import load_section
from infini_retrofit.scoring.score import next_token_nlls
from infini_retrofit.texts.splits import Document
from tests.reference import MEMORY_BRANCH
from tests.tiny import tiny_llama
from tests.tiny_project import SEGMENT as SHORT
from tests.tiny_project import STAGES, make_project, run_stage, write_params

T = 6 * SEGMENT
CACHE = MEMORY_BRANCH | {
    "memory_layers": [-1],
    "update_rule": "neural_cache",
    "num_slots": 32,
    "num_features": 8,
    "state_dtype": "bfloat16",
    "local_context": SHORT,
}


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


def test_a_memory_of_another_size_trains_beside_the_attention_that_is_trained(
    tmp_path, monkeypatch, capsys
):
    form = {f"infini.{name}": x for name, x in CACHE.items()}
    parts = {"finetune.trainable": "attention", "finetune.memory_documents": 2}
    make_project(tmp_path, **form, **parts, **{"distill.epochs": 0})
    monkeypatch.chdir(tmp_path)
    for stage in STAGES[: STAGES.index("finetune_control") + 1]:
        if stage != "baseline_eval":
            run_stage(stage)
    capsys.readouterr()
    sizes.main(["--documents", "3", "--features", "4", "8"])
    rows = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines()[-2:]]
    num_slots = CACHE["num_slots"]  # of so many numbers in 16 bits, and an id
    assert [[int(x) for x in row] for row in rows] == [[4, 12 * num_slots], [8, 20 * num_slots]]
    gains = pd.read_csv(sizes.ROWS, sep="\t").set_index("numbers")
    documents = open_documents(3)
    trained, control = (open_model(folder)[0] for folder in (sizes.FINETUNED, sizes.CONTROL))
    off = sizes.score(trained, documents, SHORT, "off")
    beside = sizes.score(control, documents, SHORT) - off
    for _, own in gains.groupby("numbers"):
        of_control = torch.tensor((own["the control"] - own["itself off"]).to_numpy())
        assert (of_control - beside).abs().max() < 2e-6
        assert own["itself off"].abs().min() > 1e-5  # it has trained
        assert (own["recent keys"] - own["selected keys"]).abs().max() > 1e-5
    anew = sizes.with_attention_of(sizes.FINETUNED, load_section(InfiniParams, "infini"))
    assert (sizes.score(anew, documents, SHORT) - off).abs().max() < 0.05
    write_params(tmp_path, {"finetune.memory_documents": 0})
    with pytest.raises(ValueError, match=r"must have a neural cache .*memory_documents 0$"):
        sizes.main([])
