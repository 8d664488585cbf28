"""`InfiniCache` as a `Cache` of transformers: its size, its rows, and its file."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.generation import cache as caches
from infini_retrofit.generation.cache import InfiniCache
from tests.reference import MODEL_FORMS, largest
from tests.tiny_generation import (
    SEGMENT,
    both_others,
    draw_ids,
    every_case,
    filled,
    generating_model,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sub" / "book.cache"


@torch.inference_mode()
def go_on(model: PreTrainedModel, cache: InfiniCache, ids: Tensor) -> Tensor:
    """Return the logits of what comes after a copy of a cache."""
    return model(ids, past_key_values=copy.deepcopy(cache)).logits


@pytest.mark.parametrize(("state_dtype", "num_bytes"), [("float32", 4), ("bfloat16", 2)])
@both_others
def test_bytes_are_those_counted_by_hand_however_long_the_text(state_dtype, num_bytes, other):
    model = generating_model("llama", other, layers=[1], state_dtype=state_dtype, local_context=3)
    heads, size = 2, 6
    key = heads * size * 4  # and as many bytes of a value
    unfinished = 2 * (2 * key + 2 * size * 4 + 1)  # with rotations, and where padding is
    memory = heads * size * (size + 1) * num_bytes
    context = (3 + 1) * unfinished // 2  # with the first token of all
    for num_segments in (1, 2, 9):
        num_tokens = num_segments * SEGMENT + 2
        others = 2 * {"segment": unfinished, "full": num_tokens * 2 * key}[other]
        cache = filled(model, draw_ids(1, num_tokens))
        assert cache.num_bytes == unfinished + memory + context + others
        assert cache.is_bounded == (other == "segment")
        # A step adds its own token, and keeps what it attended to.
        before = cache.num_bytes
        model(draw_ids(1, 1), past_key_values=cache)
        attended = 3 * (2 * key + 1)
        grown = {"segment": unfinished // 2 + attended, "full": 2 * key}[other]
        assert cache.num_bytes - before == unfinished // 2 + 2 * attended + 2 * grown


@every_case
def test_a_saved_cache_goes_on_bit_by_bit(path, family, other, form):
    model = generating_model(family, other, **form)
    # The longest window of a form is 6: in it the memory is empty for two segments.
    for num_rows, num_tokens in ((2, 1), (1, SEGMENT), (2, SEGMENT), (1, 2 * SEGMENT), (2, 13)):
        cache, more = filled(model, draw_ids(num_rows, num_tokens)), draw_ids(num_rows, 4, seed=1)
        cache.save(path, model)
        loaded = InfiniCache.load(path, model)
        assert torch.equal(go_on(model, loaded, more), go_on(model, cache, more))
        assert (loaded.num_seen, loaded.num_bytes) == (num_tokens, cache.num_bytes)
        assert largest(go_on(model, InfiniCache(model), more) - go_on(model, cache, more)) > 1e-3
        assert list(path.parent.iterdir()) == [path]


@every_case
def test_a_cache_of_rows_that_begin_late_is_saved(path, family, other, form):
    model, ids = generating_model(family, other, **form), draw_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0  # less than a segment is left
    cache = InfiniCache(model)
    with torch.inference_mode():
        model(ids, attention_mask=mask, past_key_values=cache)
    cache.save(path, model)
    mask = F.pad(mask, (0, 3), value=1)
    with torch.inference_mode():
        found, want = (
            model(draw_ids(2, 3), attention_mask=mask, past_key_values=each).logits
            for each in (InfiniCache.load(path, model), cache)
        )
    assert torch.equal(found, want)


@every_case
def test_rows_are_reordered_selected_and_repeated(family, other, form):
    model, ids = generating_model(family, other, **form), draw_ids(3, 13)
    for name, order in {
        "reorder_cache": torch.tensor([2, 0, 2]),
        "batch_select_indices": torch.tensor([1]),
        "batch_repeat_interleave": 2,
    }.items():
        cache = filled(model, ids)
        getattr(cache, name)(order)
        rows = ids[order] if isinstance(order, Tensor) else ids.repeat_interleave(order, dim=0)
        assert cache.batch_size == len(rows)
        more = draw_ids(1, 3, seed=1).expand(len(rows), -1)
        want = go_on(model, filled(model, rows), more)
        assert largest(go_on(model, cache, more) - want) < 1e-5


def test_a_cache_is_loaded_in_the_number_type_of_the_model(path):
    model, half = generating_model(), generating_model()
    filled(model, draw_ids(1, 13)).save(path, model)
    for name, parameter in half.named_parameters():
        if "memory" not in name and "gate_logit" not in name:
            parameter.data = parameter.data.bfloat16()
    cache = InfiniCache.load(path, half)
    assert cache.layer_states[0].unfinished.key.dtype == torch.bfloat16
    assert cache.layer_states[0].memory.matrix.dtype == torch.float32
    assert go_on(half, cache, draw_ids(1, 2)).isfinite().all()


def test_a_model_that_changes_its_number_type_goes_on():
    model, ids = generating_model(local_context=3), draw_ids(1, 9)
    cache = filled(model, ids[:, :6])
    for i, dtype in enumerate((torch.float32, torch.bfloat16), 6):
        logits = model.to(dtype)(ids[:, i : i + 1], past_key_values=cache).logits
        assert logits.dtype == dtype
        assert logits.isfinite().all()


def test_the_ids_that_a_neural_cache_keeps_are_never_floats(path):
    form = next(form for form in MODEL_FORMS if form.get("update_rule") == "neural_cache")
    model = generating_model(**form)
    cache = filled(model, draw_ids(1, 13))
    cache.save(path, model)
    half = generating_model(**form).to(torch.bfloat16)
    loaded = InfiniCache.load(path, half)
    (layer,) = (i for i, state in cache.layer_states.items() if state.memory is not None)
    before, after = cache.layer_states[layer], loaded.layer_states[layer]
    pairs = [(x.memory.normalizer, x.unfinished.value) for x in (before, after)]
    for one, other in zip(*pairs, strict=True):
        assert other.dtype == torch.int32
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"other_layers": "full"}, "other_layers of .* must be full, .* got segment"),
        ({"layers": [0]}, r"infini\.layers of .* must be \[0\], .* got \[1\]"),
        ({"update_rule": "delta"}, r'infini\.update_rule of .* must be "delta", .* got "linear"'),
    ],
    ids=str,
)
def test_a_cache_of_another_model_is_refused_by_name(path, over, message):
    model = generating_model(layers=[1])
    filled(model, draw_ids(1, 7)).save(path, model)
    with pytest.raises(ValueError, match=message):
        InfiniCache.load(path, generating_model(**{"layers": [1]} | over))


def test_a_cache_of_another_rotation_or_of_other_weights_is_refused(path):
    model = generating_model()
    filled(model, draw_ids(1, 7)).save(path, model)
    weight = model.lm_head.weight.data
    for place in (0, -1):
        kept = weight[place, place].clone()
        weight[place, place] *= 1.01
        with pytest.raises(ValueError, match=r"^model of "):
            InfiniCache.load(path, model)
        weight[place, place] = kept
    model.config.rope_parameters["rope_theta"] = 5.0
    with pytest.raises(ValueError, match=r"^rope_parameters of .* must be .*5\.0"):
        InfiniCache.load(path, model)


def test_the_same_model_in_other_words_goes_on(path, monkeypatch):
    model = generating_model(layers=[-1])
    filled(model, draw_ids(1, 7)).save(path, model)
    monkeypatch.setattr(caches, "_VALUES_AT_ONCE", 7)
    other = generating_model(layers=[2], bptt_segments=1)
    assert InfiniCache.load(path, other).num_seen == 7


def without(x: dict[str, Tensor], name: str) -> None:
    del x[name]


DAMAGED = {
    "negative": lambda x: x.update(num_tokens=-x["num_tokens"]),
    "zero": lambda x: x.update(num_tokens=0 * x["num_tokens"]),
    "of another segment": lambda x: x.update(num_tokens=x["num_tokens"] - 1),
    "fraction": lambda x: x.update(num_tokens=x["num_tokens"] - 0.5),
    "missing": lambda x: without(x, "carried.1.memory.matrix"),
    "strange": lambda x: x.update({"carried.9.memory.matrix": torch.ones(1)}),
    "type": lambda x: x.update({"carried.1.context.key": x["carried.1.context.key"].double()}),
    "shape": lambda x: x.update({"carried.1.context.key": x["carried.1.context.key"][1:]}),
    "emptied": lambda x: x["carried.1.memory.matrix"].zero_(),
    "nan": lambda x: x["carried.1.memory.matrix"].mul_(float("nan")),
}


@pytest.mark.parametrize("has_digest", [True, False])
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_cache_is_refused_with_its_digest_or_without(path, kind, has_digest):
    model = generating_model(layers=[1], local_context=2)
    filled(model, draw_ids(2, 13)).save(path, model)
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    if not has_digest:  # as in files that were saved before there was one
        del about["sha256"]
        save_file(tensors, path, about)
        assert InfiniCache.load(path, model).num_seen == 13
    DAMAGED[kind](tensors)
    save_file(tensors, path, about)
    with pytest.raises(ValueError, match=rf"{path}.*: delete it and read the text again"):
        InfiniCache.load(path, model)


def test_what_is_no_cache_or_of_another_format_is_refused(tmp_path, monkeypatch):
    model, text, tensors = generating_model(), tmp_path / "text", tmp_path / "tensors"
    with pytest.raises(FileNotFoundError, match=r"text is missing"):
        InfiniCache.load(text, model)
    text.write_text("not a cache")
    save_file({"x": torch.zeros(1)}, tensors)
    for path in (text, tensors, tmp_path):
        with pytest.raises(ValueError, match=r"must be a cache, got something else"):
            InfiniCache.load(path, model)
    with monkeypatch.context() as patch:
        patch.setattr(caches, "FORMAT", "3")
        InfiniCache(model).save(text, model)
    with pytest.raises(ValueError, match=r"format of .* must be 5, .* got 3: read the text again"):
        InfiniCache.load(text, model)


@both_others
def test_reset_leaves_a_new_cache_and_single_tokens_cannot_be_taken_back(other):
    model, more = generating_model("llama", other, layers=[1]), draw_ids(3, 4)
    cache = filled(model, draw_ids(2, 13))
    assert not cache.is_croppable
    with pytest.raises(ValueError, match=r"cannot remove .* got tokens_to_remove=-2: keep"):
        cache.crop(-2)
    cache.reset()
    assert (cache.num_bytes, cache.num_seen, cache.batch_size) == (0, 0, -1)
    assert torch.equal(go_on(model, cache, more), go_on(model, InfiniCache(model), more))


def test_nothing_in_a_cache_keeps_the_tokens_that_went_by():
    model = generating_model()
    cache = InfiniCache(model)
    model(draw_ids(1, 8 * SEGMENT), past_key_values=cache)
    tensors = cache._tensors().values()
    assert not any(x.requires_grad for x in tensors)
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert sum(kept.values()) == cache.num_bytes
