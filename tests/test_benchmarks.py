"""The benchmark's parts on a tiny model: what they compute and count, not how fast."""

import math
import re
from collections.abc import Callable

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import cases
from benchmarks.cases import GROUPS, Setting, Sizes
from benchmarks.measuring import Measured, ProductRate, measure_group
from benchmarks.reference_loop import score_by_reference_loop
from infini_retrofit.evaluation.protocols import score_sliding
from infini_retrofit.layer.state import State
from infini_retrofit.training.finetuning import Finetuning
from tests.tiny import FAMILIES, random_ids, tiny_base_folder, tiny_model

SIZES = Sizes(document=20, stream=43, window=11, stride=7, segment=5, sample=10)
# Of `tiny_llama` with the tiny tokenizer's vocabulary.
QKV, OUTPUT, MLP, HEAD = 24 * 24 + 2 * 24 * 12, 24 * 24, 3 * 24 * 37, 277 * 24
LAYER = QKV + OUTPUT + MLP
NAMES = [(group, name) for group, members in GROUPS.items() for name in members]


@pytest.fixture
def setting(tmp_path) -> Setting:
    folder = tiny_base_folder(tmp_path / "base")
    return Setting(folder, torch.device("cpu"), torch.float32, SIZES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_loop_scores_what_sliding_evaluation_scores(family):
    model = tiny_model(family)
    tokens = random_ids(model.config.vocab_size, 43)
    for window, stride in ((16, 8), (50, 3), (11, 7)):
        ours = score_sliding(model, tokens, window, stride)
        reference = score_by_reference_loop(model, tokens, window, stride)
        assert reference.num_scored == ours.num_scored == 42
        assert abs(reference.nll - ours.nll) < 1e-6 * ours.nll
    other = score_by_reference_loop(model, tokens, 11, 6)
    assert abs(other.nll - ours.nll) > 1e-3


@pytest.mark.parametrize(("group", "name"), NAMES, ids=[name for _, name in NAMES])
def test_every_case_can_be_repeated(setting, group, name):
    job = GROUPS[group][name](setting)
    found, operations = job.count()
    assert math.isfinite(found)
    assert job.run() == pytest.approx(found, rel=1e-5)
    assert operations > 2 * job.num_tokens * LAYER
    assert job.num_tokens == (SIZES.stream if group == "sliding" else SIZES.document)


def operations_of(make: Callable[[Setting], cases.Job], setting: Setting) -> int:
    return make(setting).count()[1]


def test_operations_equal_those_counted_by_hand(setting):
    tokens, scored = SIZES.document, SIZES.document - 1
    body = 2 * tokens * 3 * LAYER
    assert operations_of(cases.base_body, setting) == body
    for name in GROUPS["whole"]:
        assert operations_of(GROUPS["whole"][name], setting) == body
    assert operations_of(cases.base_with_head, setting) == body + 2 * scored * HEAD
    # Nothing below the first layer's projections of queries, keys and values needs a gradient.
    input_gradients = 2 * tokens * (3 * LAYER - QKV)
    weight_gradients = 2 * tokens * (QKV + OUTPUT)
    step = body + input_gradients + weight_gradients + 2 * 2 * scored * HEAD
    for name in GROUPS["layer0"]:
        assert operations_of(GROUPS["layer0"][name], setting) == step
    all_layers = step + 2 * tokens * 2 * (QKV + OUTPUT)
    for name in GROUPS["all"]:
        assert operations_of(GROUPS["all"][name], setting) == all_layers
    teacher_and_student = 2 * tokens * 2 * LAYER
    distilling = teacher_and_student + 2 * tokens * (OUTPUT + MLP + QKV + OUTPUT)
    assert operations_of(cases.distilling, setting) == distilling


@pytest.mark.parametrize("forgets", [False, True])
def test_the_loop_over_segments_trains_like_the_folded_step(setting, forgets, monkeypatch):
    if forgets:
        monkeypatch.setattr(State, "next", lambda state: State())
    kinds = (Finetuning, cases.LoopedFinetuning)
    folded, looped = (cases._training([0], True, kind=kind)(setting).run() for kind in kinds)
    assert (abs(folded - looped) > 1e-5) == forgets


def measured(name: str, seconds: list[float]) -> Measured:
    return Measured(name, 1.5, 4096, 200, 3 * 2**29, seconds, rates=[100.0, 50.0, 100.0])


def test_ratios_are_medians_over_rounds_and_stand_in_the_table():
    plain, other = measured("plain", [2.0, 8.0, 2.0]), measured("other", [3.0, 8.0, 3.0])
    assert other.times(plain) == 1.5
    assert plain.share == 1.0
    rows = [re.findall(r"[^| ]+", line) for line in command.table([plain, other]).splitlines()]
    assert rows[2:] == [
        ["plain", "4,096", "2.00", "100%", "1.00", "1.5"],
        ["other", "4,096", "3.00", "67%", "1.50", "1.5"],
    ]


def test_a_case_runs_in_a_process_of_its_own(setting):
    rate = ProductRate(torch.device("cpu"), torch.float32, size=64, repeats=3)
    (case,) = measure_group("distill", setting.base_dir, SIZES, 2, rate)
    assert len(case.seconds) == len(case.rates) == 2
    assert len(rate.measured) == 3
    assert case.operations == operations_of(cases.distilling, setting)
    assert 2**27 < case.peak_bytes < 2**33


def test_scores_that_differ_end_in_an_error(capsys):
    ours, theirs = measured("ours", []), measured("theirs", [])
    theirs.found = 1.501
    command._compare_scores(ours, theirs)
    assert "1.5000 and 1.5010" in capsys.readouterr().out
    theirs.found = 1.51
    with pytest.raises(ValueError, match="must agree"):
        command._compare_scores(ours, theirs)
