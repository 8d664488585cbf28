"""The files and metrics of every stage's `main`, run in order on tiny projects."""

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor

from infini_retrofit.evaluation.protocols import PROTOCOLS, score_unigram
from infini_retrofit.model.base import load_base
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.pipeline import guard
from infini_retrofit.pipeline.device import pick_device, pick_dtype
from infini_retrofit.pipeline.tokens import read_documents, read_samples, read_stream
from infini_retrofit.scoring.score import score_rows, score_segments, total
from stages import baseline_eval
from tests.reference import largest
from tests.tiny_project import (
    ROOT,
    SEGMENT,
    SMALL,
    STAGES,
    both_projects,
    contents,
    metrics_of,
    rows_of,
    run_stage,
)

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
TRAINED = {"distill": "distilled", "finetune": "finetuned", "finetune_control": "control"}
MODELS = ("base", "control", "distilled", "finetuned")
NUMS = {"state_bytes", "num_documents", "num_articles", "num_key_tokens"}
RESULTS = {"full_test_nll", "segment_test_nll"} | NUMS


def outputs_of(stage: str) -> set[str]:
    """Return the outputs of a stage as dvc.yaml lists them."""
    entries = [e for kind in ("outs", "metrics", "plots") for e in PIPELINE[stage].get(kind, [])]
    return {e if isinstance(e, str) else next(iter(e)) for e in entries}


@both_projects
def test_the_stages_write_what_dvc_expects_and_leave_no_checkpoints(name, finished):
    expected = set().union(*(outputs_of(stage) for stage in PIPELINE))
    assert set(STAGES) == set(PIPELINE)
    written = {f for f in contents(finished[name]) if not f.startswith(("own-", "params.yaml"))}
    assert all((finished[name] / output).exists() for output in expected)
    assert all(f in expected or f.startswith(tuple(f"{e}/" for e in expected)) for f in written)


@both_projects
def test_every_model_has_a_finite_number_under_every_protocol(name, finished):
    metrics = metrics_of(finished[name], "eval_sliding")
    extra = {"base": {"unigram_test_ppl"}, "control": {"gap_test_nats"}}
    assert set(metrics) == set(MODELS)
    for model, numbers in metrics.items():
        scored = {key: p for key, p in PROTOCOLS.items() if model in p.models and not p.rival}
        gains = {f"gain_over_{p.gain}" for p in scored.values() if p.gain} | {"gap_recovered"}
        ppls = {f"{key}_test_ppl" for key in scored}
        whole = scored.keys() - {"sliding", "t2"} if numbers["num_key_tokens"] else set()
        of_key_tokens = {f"key_token_nll_{key.removeprefix('segment_')}" for key in whole}
        assert set(numbers) == RESULTS | ppls | of_key_tokens | extra.get(model, gains), model
        assert all(math.isfinite(value) for value in numbers.values()), model
        for protocol in ("full", "segment"):
            nll = numbers[f"{protocol}_test_nll"]
            assert numbers[f"{protocol}_test_ppl"] == pytest.approx(math.exp(nll))
    for model, stage in {"base": "baseline_eval", "control": "control_eval"}.items():
        assert metrics[model] == metrics_of(finished[name], stage)


@both_projects
def test_an_untouched_base_is_below_the_unigram_on_every_path_but_the_doubly_shifted(
    name, finished
):
    metrics = metrics_of(finished[name], "baseline_eval")
    unigram = metrics.pop("unigram_test_ppl")
    doubly_shifted = metrics.pop("t2_test_ppl")
    scores = {key: value for key, value in metrics.items() if key.endswith("_ppl")}
    assert len(scores) == len([p for p in PROTOCOLS.values() if not p.rival]) - 1
    assert all(1 < value < 0.5 * unigram for value in scores.values())
    assert doubly_shifted > unigram


@both_projects
def test_the_base_s_numbers_are_of_the_test_split_and_of_its_logits(name, finished):
    metrics, data = metrics_of(finished[name], "baseline_eval"), finished[name] / "data"
    model = load_base(finished[name] / "models" / "base", pick_dtype(pick_device()))
    num_ids = model.config.vocab_size
    documents = read_documents(data / "longdocs" / "test.parquet", num_ids, SMALL["eval.documents"])
    with torch.no_grad():
        logits = model(input_ids=documents, use_cache=False).logits.float()
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), documents[:, 1:].flatten()).item()
    assert metrics["full_test_nll"] == pytest.approx(nll, rel=0.01)
    stream = read_stream(data / "wikitext" / "test.parquet", num_ids, SMALL["eval.sliding_tokens"])
    train = read_stream(data / "wikitext" / "train.parquet", num_ids)
    unigram = score_unigram(train, stream, num_ids)
    assert metrics["unigram_test_ppl"] == pytest.approx(unigram.ppl)


@both_projects
@pytest.mark.parametrize("stage", TRAINED)
def test_what_was_validated_is_the_saved_model_on_the_val_split(name, stage, finished):
    folder, dtype = finished[name], pick_dtype(pick_device())
    model, _ = load_retrofit(folder / "models/base", folder / "models" / TRAINED[stage], dtype)
    num_ids = model.config.vocab_size
    if stage == "distill":
        length, number = SMALL["distill.tokens_per_sample"], SMALL["distill.val_samples"]
        rows = read_samples(folder / "data/wikitext/val.parquet", num_ids, length, number)
        score = total(score_rows(model, rows))
    else:
        path, number = folder / "data/longdocs/val.parquet", SMALL["finetune.val_documents"]
        score = total(score_segments(model, read_documents(path, num_ids, number), SEGMENT))
    assert metrics_of(folder, stage)["val_ppl"] == pytest.approx(score.ppl, rel=0.02)


@both_projects
def test_the_plots_hold_the_metrics(name, finished):
    metrics = metrics_of(finished[name], "eval_sliding")
    drawn = {(r["model"], r["protocol"]): r["ppl"] for r in rows_of(finished[name], "eval_sliding")}
    assert drawn == {
        (model, key.removesuffix("_test_ppl")): str(value)
        for model, numbers in metrics.items()
        for key, value in numbers.items()
        if key.endswith("_test_ppl")
    }
    for stage in TRAINED:
        result, rows = metrics_of(finished[name], stage), rows_of(finished[name], stage)
        epochs = [str(epoch) for epoch in range(result["epochs_run"] + 1)]
        assert [r["epoch"] for r in rows if r["split"] == "val"] == epochs
        assert [r["epoch"] for r in rows if r["split"] == "train"] == epochs[1:]
        best = rows.index(next(r for r in rows if r["loss"] == str(result["val_loss"])))
        best_values = (result["best_epoch"], "val", result["val_loss"], result["val_ppl"])
        assert tuple(rows[best].values()) == tuple(map(str, best_values))


def layer_weights(folder: Path, model: str) -> Tensor:
    """Return the query projection of layer 0."""
    file = "model" if model == "base" else "retrofit"
    weights = load_file(folder / "models" / model / f"{file}.safetensors")
    return weights["model.layers.0.self_attn.q_proj.weight"].float()


def test_the_control_starts_from_the_base_and_the_finetuned_from_the_distilled(finished):
    weights = {model: layer_weights(finished["linear"], model) for model in MODELS}
    assert 0 < largest(weights["control"] - weights["base"]) < 0.01
    assert 0 < largest(weights["finetuned"] - weights["distilled"]) < 0.01
    assert largest(weights["distilled"] - weights["base"]) > 0.1


def test_the_control_needs_no_distilled_model_and_comes_out_the_same(project):
    before = contents(project / "models" / "control")
    for model in ("control", "distilled", "finetuned"):
        shutil.rmtree(project / "models" / model)
    run_stage("finetune_control")
    assert contents(project / "models" / "control") == before


def test_a_stage_says_what_it_made_and_warns_of_documents_beyond_the_positions(
    project, monkeypatch, capsys
):
    base = load_base(project / "models/base", torch.float32)
    base.config.max_position_embeddings = 63
    monkeypatch.setattr(baseline_eval, "load_base", lambda *_: base)
    guard.run_stage(baseline_eval.main)
    said = capsys.readouterr()
    assert re.fullmatch(r"baseline_eval: base 3 documents, perplexity .*, \d+\.\d s\n", said.out)
    assert "warning: documents of 64 tokens exceed the 63 positions" in said.err
