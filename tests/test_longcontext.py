"""Readers of long texts: caches, baselines and the stage's cells, against slow references."""

import copy
import itertools
import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import readers as benchmark
from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.longcontext import readers
from infini_retrofit.longcontext.cells import (
    Cell,
    Cells,
    Result,
    cells_of,
    check_prompts,
    longest,
    plan,
    prompts_of,
    range_begins,
)
from infini_retrofit.longcontext.cells import metrics_of as metrics_of_cells
from infini_retrofit.longcontext.params import LongcontextParams
from infini_retrofit.longcontext.readers import (
    Reader,
    carrying_reader,
    cut_after,
    full_reader,
    infini_reader,
    scaled_reader,
    window_reader,
)
from infini_retrofit.longcontext.scaling import scale_rope
from infini_retrofit.model.retrofit import (
    attention_shapes,
    branch_token_bytes,
    insert_infini,
    state_bytes,
)
from infini_retrofit.model.running import run_folded
from infini_retrofit.texts.prompts import Question
from stages import eval_longcontext
from tests.reference import MEMORY_BRANCH
from tests.test_prompts import maker
from tests.tiny import FAMILIES, ids_for, tiny_model
from tests.tiny_project import both_projects, metrics_of, rows_of, run_stage

SEGMENT, PIECE = 8, 16
FORM = InfiniParams(segment_length=SEGMENT)
PARAMS = LongcontextParams(
    samples=2,
    lengths=[400, 900],
    depths=[0.0, 1.0],
    haystacks=["sentence", "text"],
    pairs=[1],
    needles=[2],
    questions=1,
    compressions=[1, 4, 16],
    distance=128,
    documents=2,
    document_tokens=[256],
    baselines=[],
    window=16,
)


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch):
    monkeypatch.setattr(readers, "TOKENS_PER_PIECE", PIECE)


def retrofit(family: str) -> Reader:
    model = tiny_model(family)
    insert_infini(model, FORM)
    return infini_reader("finetuned", model, FORM)


def all_readers(family: str) -> list[Reader]:
    model = tiny_model(family)
    return [
        full_reader("base", model),
        window_reader("window", model, 0, 24),
        window_reader("streaming", model, 4, 24),
        scaled_reader(model, "dynamic", 900),
        carrying_reader("equal_bytes", model, SEGMENT, 5),
        retrofit(family),
    ]


def log_prob(model, ids: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([ids + answer[:-1]]), use_cache=False).logits[0]
    found = logits[-len(answer) :].log_softmax(-1)
    return float(found.gather(-1, torch.tensor(answer)[:, None]).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_full_attention_scores_and_answers_as_a_model_that_reads_all_at_once(family):
    model = tiny_model(family)
    reader, ids = full_reader("base", model), ids_for(model, 1, 75)[0]
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0]
    expected = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
    torch.testing.assert_close(reader.nlls(ids), expected)
    text, asked = ids[:40].tolist(), ids[40:46].tolist()
    answers = ids[46:73].view(9, 3).tolist()
    scores = [log_prob(model, text + asked, answer) for answer in answers]
    best = max(range(9), key=scores.__getitem__)
    cache = reader.read(torch.tensor(text))
    for right in range(9):
        ordered = [answers[right], *answers[:right], *answers[right + 1 :]]
        assert reader.answer(cache, Question(asked, ordered))[0] == (right == best)
    with torch.no_grad():
        grown = model.generate(torch.tensor([text + asked]), max_new_tokens=3, do_sample=False)
    likeliest = grown[0, -3:].tolist()
    assert reader.answer(cache, Question(asked, [likeliest, answers[0]]))[1]
    wrong = [*likeliest[:2], (likeliest[2] + 1) % model.config.vocab_size]
    assert not reader.answer(cache, Question(asked, [wrong, answers[0]]))[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_retrofit_scores_as_it_was_trained_and_one_question_does_not_change_the_next(family):
    reader, ids = retrofit(family), ids_for(tiny_model(family), 1, 80)[0]
    model = tiny_model(family)
    insert_infini(model, FORM)
    with torch.no_grad():
        hidden = run_folded(model, ids[None], SEGMENT)[0, :-1]
    logits = model.get_output_embeddings()(hidden)
    expected = F.cross_entropy(logits, ids[1:], reduction="none")
    torch.testing.assert_close(reader.nlls(ids), expected, rtol=1e-4, atol=1e-4)
    cache = reader.read(ids[:45])
    question = Question(ids[45:52].tolist(), ids[52:73].view(7, 3).tolist())
    first = reader.answer(cache, question)
    reader.answer(cache, Question(question.input_ids[::-1], question.candidates))
    assert (reader.answer(cache, question), cache.num_seen) == (first, 45)


def windowed_logits(model, ids: Tensor, num_sinks: int, window: int) -> Tensor:
    """Return the logits of the last piece, each piece read anew with what a window leaves."""
    begin = (len(ids) - 1) // PIECE * PIECE
    kept = range(max(num_sinks, begin - window), begin)
    seen = torch.tensor([*range(min(num_sinks, begin)), *kept, *range(begin, len(ids))])
    with torch.no_grad():
        return model(ids[seen][None], use_cache=False).logits[0, begin - len(ids) :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_sinks", [0, 4])
def test_one_layer_of_a_window_sees_sinks_and_window_at_the_places_of_a_short_text(
    family, num_sinks
):
    # Deeper layers' keys hold what has left: only one layer can be computed anew.
    model = tiny_model(family, num_hidden_layers=1)
    reader, ids = window_reader("window", model, num_sinks, 24), ids_for(model, 1, 75)[0]
    cache = reader.read(ids[:64])
    with torch.inference_mode():
        hidden = reader._run(ids[None, 64:], cache)
        logits = model.get_output_embeddings()(hidden)[0]
    torch.testing.assert_close(
        logits, windowed_logits(model, ids, num_sinks, 24), rtol=1e-4, atol=1e-4
    )
    assert cache.layers[0].keys.shape[-2] == num_sinks + 24
    with pytest.raises(AssertionError):
        torch.testing.assert_close(logits, windowed_logits(model, ids, 4 - num_sinks, 24))


def test_sinks_are_not_rotated_in_a_layer_without_rotations():
    sizes = {"num_hidden_layers": 1, "no_rope_layers": [0], "vocab_size": 67, "hidden_size": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 37}
    torch.manual_seed(0)
    config = AutoConfig.for_model("smollm3", **sizes, **heads, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    reader, ids = window_reader("streaming", model, 4, 24), ids_for(model, 1, 75)[0]
    with torch.inference_mode():
        hidden = reader._run(ids[None, 64:], reader.read(ids[:64]))
        logits = model.get_output_embeddings()(hidden)[0]
    torch.testing.assert_close(logits, windowed_logits(model, ids, 4, 24), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_reader_counts_the_bytes_that_it_keeps(family):
    ids = ids_for(tiny_model(family), 1, 75)[0]
    full, window, streaming, dynamic, carrying, infini = all_readers(family)
    token = sum(x.numel() for layer in full.read(ids).layers for x in (layer.keys, layer.values))
    assert full.num_bytes(75) == dynamic.num_bytes(75) == 2 * token
    for reader, num_tokens in ((window, 24), (streaming, 28)):
        kept = reader.read(ids).layers
        found = sum(x.numel() for layer in kept for x in (layer.keys, layer.values))
        assert reader.num_bytes(75) == 2 * token // 75 * num_tokens == 2 * found
    assert carrying.num_bytes(75) == 2 * token // 75 * (SEGMENT + 5)
    assert infini.num_bytes(75) > 2 * token // 75 * SEGMENT


@pytest.mark.parametrize("rule", ["neural_cache", "gated_delta"])
def test_what_a_branch_keeps_of_an_open_segment_is_counted(rule):
    form = InfiniParams(
        **(MEMORY_BRANCH | {"update_rule": rule, "num_features": 6, "feature_map": "unit"}),
        num_slots=7 if rule == "neural_cache" else 0,
        segment_length=SEGMENT,
        state_dtype="bfloat16",
    )
    model = tiny_model("llama").bfloat16()
    insert_infini(model, form)
    reader = infini_reader("finetuned", model, form)
    ids = ids_for(model, 1, 6 * SEGMENT)[0]
    kept = [reader.read(ids[: 5 * SEGMENT + n])._tensors() for n in (SEGMENT - 2, SEGMENT - 1)]
    one, two = (
        sum(x.nbytes for name, x in tensors.items() if re.search(r"unfinished\.(key|value)$", name))
        for tensors in kept
    )
    per_token = two - one
    token_bytes = sum(shape.context_token_bytes() for shape in attention_shapes(model))
    assert per_token == token_bytes + branch_token_bytes(model) > token_bytes
    assert branch_token_bytes(tiny_model("llama"), form) == branch_token_bytes(model)
    assert reader.num_bytes(99) == state_bytes(model) + SEGMENT * per_token


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_of_one_token_is_the_likeliest_next_one(family):
    for reader in all_readers(family):
        ids = ids_for(reader.model, 1, 40)[0]
        cache = reader.read(ids[:30])
        hidden = reader._run(ids[None, 30:], copy.deepcopy(cache))
        likeliest = int(reader._log_probs(hidden)[0, -1].argmax())
        others = [i for i in range(5) if i != likeliest]
        question = Question(ids[30:].tolist(), [[likeliest], *([i] for i in others)])
        assert reader.answer(cache, question) == (True, True)


def tables(model) -> Tensor:
    return model.base_model.rotary_emb.inv_freq


@pytest.mark.parametrize("family", FAMILIES)
def test_each_scaling_changes_the_tables_as_its_formula_says(family):
    model, factor = tiny_model(family), 4.0
    plain, num = tables(model), 2 * len(tables(model))
    assert torch.equal(tables(scale_rope(model, "linear", factor)), plain / factor)
    yarn = scale_rope(model, "yarn", factor)
    assert yarn.base_model.rotary_emb.attention_scaling == pytest.approx(1.1386294)  # 0.1 ln 4 + 1
    # YaRN and Llama 3 keep fast rotations and divide slow ones.
    for kind in ("yarn", "llama3"):
        ratio = plain / tables(scale_rope(model, kind, factor))
        assert ratio[0] == pytest.approx(1.0)
        assert (ratio <= factor + 1e-4).all()
        assert (ratio.diff() >= -1e-4).all()
        assert ratio[-1] > 1
    reader, length = scaled_reader(model, "dynamic", 2048), 1024
    reader.new_cache(length)
    # The base of the powers grows with the document: (length / trained) ^ (d / (d - 2)).
    grown = (length / 512) ** (num / (num - 2))
    powers = torch.arange(0, num, 2) / num
    torch.testing.assert_close(tables(reader.model), plain * grown**-powers)
    assert torch.equal(tables(model), plain)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_a_base_whose_rotations_are_scaled_already_has_no_scaled_rival(kind, project, monkeypatch):
    base = scale_rope(tiny_model("llama"), kind, 2.0)
    monkeypatch.setattr(eval_longcontext, "load_base", lambda *_: base)
    with pytest.raises(ValueError, match=rf"^longcontext\.baselines must .* got rope_type {kind}$"):
        run_stage("eval_longcontext")


def test_rotations_are_scaled_to_the_longest_text_whatever_stands_before_them(project):
    params = replace(PARAMS, baselines=["equal_bytes", "yarn"])
    form = InfiniParams(layers="all", segment_length=16, local_context=0)
    cpu = torch.device("cpu")
    made = eval_longcontext.readers(params, form, 2048, cpu, torch.float32)
    found = {reader.name: reader for reader in itertools.islice(made, 3)}
    longest_read = found["base"].most_tokens
    rope = found["yarn"].model.config.rope_parameters
    assert rope["factor"] == -(-2048 // longest_read) > 1


def test_dynamic_scaling_does_not_let_one_document_change_the_next():
    model = tiny_model("llama", max_position_embeddings=32)
    ids = ids_for(model, 1, 90)[0]
    reader = scaled_reader(model, "dynamic", 90)
    alone = reader.nlls(ids[:60])
    reader.nlls(ids)
    assert torch.equal(reader.nlls(ids[:60]), alone)
    short = full_reader("base", model).nlls(ids[:30])
    assert torch.equal(reader.nlls(ids[:30]), short)
    assert not torch.allclose(alone[:29], short)  # the tables are those of the whole document
    # That of transformers does.
    theirs = scale_rope(model, "dynamic", 3.0)
    theirs.base_model.rotary_emb.rope_type = "dynamic"
    with torch.no_grad():
        first = theirs(ids[None, :60], use_cache=False).logits
        theirs(ids[None], use_cache=False)
        assert not torch.equal(theirs(ids[None, :60], use_cache=False).logits, first)


def test_compressions_are_counted_and_segments_of_another_length_come_back():
    reader = retrofit("llama")
    cells = [c for c in plan(PARAMS, reader, maker()) if c.task in ("compressions", "distance")]
    found = {(c.task, c.number): c.tokens for c in cells}
    assert found == {
        # One segment has no room for a question.
        ("compressions", 4): 4 * SEGMENT,
        ("compressions", 16): 16 * SEGMENT,
        ("distance", 1): 128,
        ("distance", 4): 128,
    }
    ids = ids_for(reader.model, 1, 64)[0]
    writes: list[int] = []
    memory = next(m for m in reader.model.modules() if hasattr(m, "states"))
    own = memory.states
    memory.states = lambda f, *rest: (writes.append(f.shape[1]), own(f, *rest))[1]
    before = reader.nlls(ids)
    coarse = sum(writes)
    writes.clear()
    kept = reader.num_bytes(64)
    with cut_after(reader.model, SEGMENT // 2):
        assert not torch.allclose(reader.nlls(ids), before)
        assert reader.num_bytes(64) < kept
    assert sum(writes) == 2 * coarse > 0
    assert torch.equal(reader.nlls(ids), before)


def test_a_reader_with_a_trained_length_skips_what_is_longer_and_others_do_not():
    base = full_reader("base", tiny_model("llama"))  # 512 positions
    params = replace(PARAMS, pairs=[1, 64])
    for reader, lengths, pairs in (
        (base, {400}, {1}),  # 64 numbers take 1,900 tokens
        (window_reader("window", tiny_model("llama"), 0, 24), {400, 900}, {1, 64}),
    ):
        cells = plan(params, reader, maker())
        assert {c.tokens for c in cells if c.task == "passkey"} == lengths
        assert {c.number for c in cells if c.task == "capacity"} == pairs
    assert longest(params, maker()) > 900 == longest(PARAMS, maker())
    assert range_begins(2049) == [0, 256, 512, 1024, 2048]


def test_a_memory_is_not_asked_for_what_attention_may_still_see():
    form = {"update_rule": "gated_delta", "num_features": 6, "segment_length": 16}
    form = InfiniParams(**MEMORY_BRANCH, **form, local_context=48)
    model = tiny_model("llama")
    insert_infini(model, form)
    params = replace(PARAMS, compressions=[1, 3, 4, 16], samples=30)
    cells = plan(params, infini_reader("finetuned", model, form), make := maker())
    asked = [cell for cell in cells if cell.task == "compressions"]
    assert [cell.number for cell in asked] == [4, 16]
    for prompt in prompts_of(asked[0], params, make):
        read = [*prompt.input_ids, *prompt.questions[0].input_ids]
        seen = read[-form.segment_length - form.local_context :]  # at most
        assert make.has_digit[read].any()
        assert not make.has_digit[seen].any()


def test_each_cell_has_prompts_of_its_own():
    cells = [c for c in cells_of(PARAMS, "base", None, 0) if c.task == "passkey"]
    keys = [
        tuple(prompt.questions[0].candidates[0])
        for cell in cells
        for prompt in prompts_of(cell, PARAMS, maker())
    ]
    assert len(set(keys)) == len(keys) == PARAMS.samples * len(cells)
    again = [*prompts_of(cells[0], PARAMS, maker())]
    other = replace(cells[0], model="control")
    assert again == [*prompts_of(other, PARAMS, maker())]


def test_segments_that_are_cut_for_a_task_do_not_count_as_what_a_model_keeps():
    cell = Cell("finetuned", "passkey", "text", 512, 0.5, 1)
    counts = {"asked": 1, "chosen": 1, "greedy": 0, "nll_sums": []}
    plain = Result(**vars(cell), **counts, num_bytes=7)
    coarse = replace(plain, task="distance", num_bytes=99)
    assert metrics_of_cells([plain, coarse])["state_bytes"] == 7
    assert metrics_of_cells([coarse])["state_bytes"] == 99


def test_a_killed_run_goes_on_from_its_whole_lines(tmp_path):
    path, cell = tmp_path / "cells.jsonl", Cell("base", "passkey", "text", 512, 0.5, 1)
    done = Result(**vars(cell), asked=3, chosen=2, greedy=1, num_bytes=7, nll_sums=[])
    Cells(path).add(done)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    kept = Cells(path)
    assert kept.found == {cell: done}
    kept.add(replace(done, depth=1.0))
    assert len(Cells(path).found) == 2


@both_projects
def test_the_stage_scores_every_reader_on_the_same_prompts(name, finished):
    metrics = metrics_of(finished[name], "eval_longcontext")
    assert set(metrics) == {"base", "control", "finetuned", "equal_bytes", "streaming", "yarn"}
    for model, numbers in metrics.items():
        # Two depths, a stored number, one in a haystack; since a memory was written, two more.
        assert numbers["num_asked"] == (6 if model == "finetuned" else 4)
        assert all(0 <= v <= 1 for k, v in numbers.items() if k.endswith(("accuracy", "greedy")))
    rows = rows_of(finished[name], "longcontext_positions")
    by_model = {row["model"]: float(row["nll"]) for row in rows}
    assert by_model["base"] == pytest.approx(by_model["yarn"])  # inside the trained length
    assert len({row["model"] for row in rows_of(finished[name], "longcontext_passkey")}) == 6
    lines = (finished[name] / "data" / "longcontext.jsonl").read_text().splitlines()
    assert len(lines) == sum(1 for _ in map(json.loads, lines)) > 6


def test_the_benchmark_times_every_reader(project, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["readers", "--tokens", "128"])
    benchmark.main()
    table = capsys.readouterr().out
    names = {"base", "window", "streaming", "equal_bytes", "yarn", "control", "finetuned"}
    assert {line.split("|")[1].strip() for line in table.splitlines()[2:]} == names


def test_a_document_that_is_longer_than_the_articles_is_refused(project, monkeypatch):
    params = replace(PARAMS, document_tokens=[10**6])
    monkeypatch.setattr(eval_longcontext, "load_section", lambda kind, _: params)
    with pytest.raises(ValueError, match=r"^longcontext\.document_tokens must be at most \d+, "):
        run_stage("eval_longcontext")


@pytest.mark.parametrize(
    ("task", "over"),
    [
        ("lengths", {"lengths": [128, 400]}),
        ("needles", {"needles": [60]}),
        ("compressions", {"compressions": [4]}),
    ],
)
def test_a_size_without_room_for_its_prompt_is_named_before_anything_is_read(task, over):
    make = maker()
    check_prompts(replace(PARAMS, compressions=[16]), SEGMENT, 0, make)
    with pytest.raises(ValueError, match=rf"^longcontext\.{task} must leave room .* tokens more$"):
        check_prompts(replace(PARAMS, **{"compressions": [16]} | over), SEGMENT, 0, make)


@pytest.mark.parametrize(
    ("task", "needed"),
    [
        ("lengths", "depths"),
        ("lengths", "haystacks"),
        ("needles", "haystacks"),
        ("compressions", "haystacks"),
        ("needles", "lengths"),
    ],
)
def test_no_task_is_left_out_without_a_word(task, needed):
    names = ("lengths", "needles", "compressions")
    others = {name: [] for name in names if name not in (task, needed)}
    with pytest.raises(ValueError, match=rf"^longcontext\.{task} must be \[\] when .*{needed}"):
        replace(PARAMS, **{needed: []} | others)


def test_what_is_named_twice_is_refused_for_it_would_count_twice():
    with pytest.raises(ValueError, match=r"^longcontext\.baselines must name each value once, got"):
        replace(PARAMS, baselines=["window", "window"])
