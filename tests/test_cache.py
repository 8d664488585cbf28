"""`InfiniCache` as a `Cache` of transformers: its size, its rows, and its file."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from infini_retrofit.generation import cache_file
from infini_retrofit.generation.cache import InfiniCache
from infini_retrofit.generation.generation import read
from tests.reference import largest
from tests.tiny import FAMILIES
from tests.tiny_generation import SEGMENT, draw_ids, generating_model

FORMS = (
    {"layers": [0, 2], "local_context": 2},
    {"insertion": "parallel", "layers": [1], "decay": "feature"},
    {"local": "linear", "positions": "none"},
    {"layers": [1], "state_dtype": "bfloat16"},
)
every_form = pytest.mark.parametrize("form", FORMS, ids=str)
OTHERS = pytest.mark.parametrize("other", ["segment", "full"])


def filled(model: PreTrainedModel, ids: Tensor) -> InfiniCache:
    cache = InfiniCache(model)
    list(read(model, ids, cache))
    return cache


@torch.inference_mode()
def go_on(model: PreTrainedModel, cache: InfiniCache, ids: Tensor) -> Tensor:
    """Return the logits of what comes after a copy of a cache."""
    cache = copy.deepcopy(cache)
    return model(ids, past_key_values=cache).logits


@every_form
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_keeps_as_many_bytes_after_many_segments_as_after_one(family, form):
    model = generating_model(family, **form)
    sizes = [filled(model, draw_ids(2, n * SEGMENT + 3)).num_bytes for n in (1, 2, 9)]
    assert len(set(sizes)) == 1
    largest_size = filled(model, draw_ids(2, 3 * SEGMENT - 1)).num_bytes
    for num_tokens in (1, 3, 4, 5, 6):
        assert filled(model, draw_ids(2, num_tokens)).num_bytes <= largest_size


def test_layers_that_see_everything_make_the_cache_grow():
    model = generating_model(other_layers="full", layers=[0, 2])
    short, long = (filled(model, draw_ids(1, n * SEGMENT)) for n in (1, 4))
    keys_and_values = 2 * 2 * 6 * 4  # kinds, heads, channels, bytes
    assert long.num_bytes - short.num_bytes == 3 * SEGMENT * keys_and_values
    assert not long.is_bounded
    assert filled(generating_model(layers=[0, 2]), draw_ids(1, 1)).is_bounded


@pytest.mark.parametrize(("state_dtype", "num_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_are_those_of_the_tensors_counted_by_hand(state_dtype, num_bytes):
    model = generating_model(layers=[1], state_dtype=state_dtype)
    heads, size, rotated = 2, 6, 6
    segment = 3 * (2 * heads * size * 4 + 2 * rotated * 4 + 1)
    memory = heads * size * (size + 1) * num_bytes
    assert filled(model, draw_ids(1, SEGMENT + 3)).num_bytes == 3 * segment + memory


@OTHERS
@every_form
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_cache_goes_on_bit_by_bit(tmp_path, family, form, other):
    model = generating_model(family, other, **form)
    cache, more = filled(model, draw_ids(2, 13)), draw_ids(2, 4, seed=1)
    cache.save(tmp_path / "sub" / "book.cache", model)
    loaded = InfiniCache.load(tmp_path / "sub" / "book.cache", model)
    assert torch.equal(go_on(model, loaded, more), go_on(model, cache, more))
    assert (loaded.num_seen, loaded.num_bytes) == (13, cache.num_bytes)
    assert largest(go_on(model, InfiniCache(model), more) - go_on(model, cache, more)) > 1e-3
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["book.cache"]


def test_a_cache_is_loaded_in_the_number_type_of_the_model(tmp_path):
    model = generating_model()
    filled(model, draw_ids(1, 13)).save(tmp_path / "book.cache", model)
    half = generating_model()
    for name, parameter in half.named_parameters():
        if "memory" not in name and "gate_logit" not in name:
            parameter.data = parameter.data.bfloat16()
    cache = InfiniCache.load(tmp_path / "book.cache", half)
    assert cache.layer_states[0].unfinished.key.dtype == torch.bfloat16
    assert cache.layer_states[0].memory.matrix.dtype == torch.float32
    assert go_on(half, cache, draw_ids(1, 2)).isfinite().all()


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"segment_length": 6}, "segment_length of .* must be 6, .* got 5"),
        ({"other_layers": "full"}, "other_layers of .* must be full, .* got segment"),
        ({"layers": [0]}, r"infini\.layers of .* must be \[0\], .* got \[1\]"),
        ({"update_rule": "delta"}, r'infini\.update_rule of .* must be "delta", .* got "linear"'),
        ({"local": "linear"}, r'infini\.local of .* must be "linear", .* got "softmax"'),
        ({"local_context": 2}, r"infini\.local_context of .* must be 2, .* got 0"),
        ({"seed_scaling": True}, r"infini\.seed_scaling of .* must be true, .* got false"),
        (
            {"feature_map": "hedgehog"},
            r'infini\.feature_map of .* must be "hedgehog", .* got "elu1"',
        ),
        ({"positions": "none"}, r'infini\.positions of .* must be "none", .* got "rope"'),
        ({"family": "gpt_neox"}, "model of .* must be "),
    ],
    ids=str,
)
def test_a_cache_of_another_model_is_refused_by_name(tmp_path, over, message):
    model = generating_model(layers=[1])
    filled(model, draw_ids(1, 7)).save(tmp_path / "book.cache", model)
    with pytest.raises(ValueError, match=message):
        InfiniCache.load(tmp_path / "book.cache", generating_model(**{"layers": [1]} | over))


@pytest.mark.parametrize("place", [0, -1])
def test_a_cache_of_other_weights_is_refused(tmp_path, place):
    model = generating_model()
    filled(model, draw_ids(1, 7)).save(tmp_path / "book.cache", model)
    model.lm_head.weight.data[place, place] *= 1.01
    with pytest.raises(ValueError, match=r"^model of "):
        InfiniCache.load(tmp_path / "book.cache", model)


def test_a_cache_of_another_rotation_is_refused(tmp_path):
    model = generating_model()
    filled(model, draw_ids(1, 7)).save(tmp_path / "book.cache", model)
    model.config.rope_parameters["rope_theta"] = 5.0
    with pytest.raises(ValueError, match=r"^rope_parameters of .* must be .*5\.0"):
        InfiniCache.load(tmp_path / "book.cache", model)


def test_the_same_model_in_other_words_goes_on(tmp_path, monkeypatch):
    model = generating_model(layers=[-1])
    filled(model, draw_ids(1, 7)).save(tmp_path / "book.cache", model)
    monkeypatch.setattr(cache_file, "_VALUES_AT_ONCE", 7)
    other = generating_model(layers=[2], bptt_segments=1)
    assert InfiniCache.load(tmp_path / "book.cache", other).num_seen == 7


def test_what_is_no_cache_is_refused(tmp_path):
    model, path = generating_model(), tmp_path / "book.cache"
    with pytest.raises(FileNotFoundError, match=r"book\.cache is missing"):
        InfiniCache.load(path, model)
    path.write_text("not a cache")
    for number in range(3):
        if number == 1:
            save_file({"x": torch.zeros(1)}, path)
        if number == 2:
            path.unlink()
            path.mkdir()
        with pytest.raises(ValueError, match=r"must be a cache that .* wrote, got something else"):
            InfiniCache.load(path, model)


def test_a_cache_of_another_format_is_refused(tmp_path, monkeypatch):
    model, path = generating_model(), tmp_path / "book.cache"
    monkeypatch.setattr(cache_file, "FORMAT", "3")
    filled(model, draw_ids(1, 7)).save(path, model)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"format of .* must be 4, .* got 3: read the text again"):
        InfiniCache.load(path, model)


@OTHERS
@every_form
def test_rows_are_reordered_selected_and_repeated(form, other):
    model, ids = generating_model(other_layers=other, **form), draw_ids(3, 13)
    more = draw_ids(4, 3, seed=1)
    orders = {
        "reorder_cache": torch.tensor([2, 0, 2]),
        "batch_select_indices": torch.tensor([1]),
        "batch_repeat_interleave": 2,
    }
    for name, order in orders.items():
        cache = filled(model, ids)
        getattr(cache, name)(order)
        rows = ids[order] if isinstance(order, Tensor) else ids.repeat_interleave(order, dim=0)
        assert cache.batch_size == len(rows)
        after = more[:1].expand(len(rows), -1)
        want = go_on(model, filled(model, rows), after)
        assert largest(go_on(model, cache, after) - want) < 1e-5


@OTHERS
def test_reset_leaves_a_new_cache(other):
    model, ids = generating_model(other_layers=other, layers=[1]), draw_ids(2, 13)
    cache = filled(model, ids)
    cache.reset()
    assert (cache.num_bytes, cache.num_seen, cache.batch_size) == (0, 0, -1)
    more = draw_ids(3, 4)
    assert torch.equal(go_on(model, cache, more), go_on(model, InfiniCache(model), more))


def test_tokens_cannot_be_taken_back():
    cache = filled(generating_model(), draw_ids(1, 7))
    assert not cache.is_croppable
    cache.crop(0)
    with pytest.raises(ValueError, match=r"tokens_to_remove must be 0, .*, got -2"):
        cache.crop(-2)


def test_nothing_in_a_cache_keeps_the_tokens_that_went_by():
    model = generating_model()
    cache = InfiniCache(model)
    model(draw_ids(1, 8 * SEGMENT), past_key_values=cache)
    tensors = cache._tensors().values()
    assert not any(x.requires_grad for x in tensors)
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert sum(kept.values()) == cache.num_bytes
