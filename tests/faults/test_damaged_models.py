"""Damaged files of a base, a retrofit, an export and a saved cache: each refused in one sentence.

Whoever damages a file here also writes the manifest anew: the files are checked for themselves.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, dynamic_module_utils

from infini_retrofit.generation.cache import InfiniCache
from infini_retrofit.model.base import load_base, load_tokenizer
from infini_retrofit.model.checkpoints import CONFIG, WEIGHTS, load_retrofit
from infini_retrofit.pipeline.files import write_manifest
from infini_retrofit.share.exported_folder import About, export_model
from tests.tiny_export import export, make_retrofit
from tests.tiny_generation import draw_ids, filled, generating_model

pytestmark = pytest.mark.faults
BASE, RETROFIT, EXPORT = "models/base", "models/finetuned", "open"
BASE_WEIGHTS, EXPORT_WEIGHTS = f"{BASE}/model.safetensors", f"{EXPORT}/model.safetensors"
CACHE = "book.cache"
WAYS_OUT = ("run `", "read the text again", "write it by `", "chat write one")
Tensors = dict[str, Tensor]


def largest(tensors: Tensors) -> str:
    return max(tensors, key=lambda name: tensors[name].numel())


def with_value(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[largest(tensors)].view(-1)[-1] = value

    return change


def with_largest(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def change_one(tensors: Tensors) -> None:
        name = largest(tensors)
        tensors[name] = change(tensors[name]).contiguous()

    return change_one


TENSORS = {
    "lacks one": lambda x: x.pop(largest(x)),
    "one more": lambda x: x.update(stranger=torch.zeros(3)),
    "another name": lambda x: x.update({"../x": x.pop(largest(x))}),
    "none": dict.clear,
    "nan": with_value(float("nan")),
    "infinite": with_value(float("inf")),
    "a row less": with_largest(lambda x: x[:-1]),
    "an axis more": with_largest(lambda x: x[None]),
    "no values": with_largest(lambda x: x[:0]),
    "whole numbers": with_largest(Tensor.long),
    "float64": with_largest(Tensor.double),
    "bool": with_largest(Tensor.bool),
}
BYTES = {
    "empty": lambda _: b"",
    "cut": lambda old: old[:-7],
    "cut in the header": lambda old: old[:99],
    "more behind": lambda old: old + b"more",
    "a pickle": lambda _: b"\x80\x04K\x01.",
    "a text": lambda _: b"not at all what is wanted here, in words",
    "a header of 2^60 bytes": lambda _: (2**60).to_bytes(8, "little") + b"{}",
    "a deep header": lambda _: (10**5).to_bytes(8, "little") + b'{"a":' * 20_000,
}
JSONS = {
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "a number": b"7",
    "cut": b'{"format": 4, "base',
    "deep": b"[" * 200_000,
    "no text": b"\xff\xfe\x00",
    "a key twice": b'{"name": "a", "name": "b"}',
    "nan": b'{"name": NaN}',
}
FORMS = {
    "update_rule": "../x",
    "positions": None,
    "state_dtype": "float8",
    "gate": "token",
    "decay": [],
    "layers": [0, 0],
    "segment_length": 5.5,
    "local_context": True,
    "num_features": -2,
    "bptt_segments": 0,
    "seed_scaling": 1,
    "mood": "good",
}
CONFIGS = {
    "hidden_size": 0,
    "num_hidden_layers": 10**9,
    "num_attention_heads": 0,
    "vocab_size": "277",
    "model_type": "../x",
    "hidden_act": "x",
    "rope_parameters": {"rope_type": "x"},
    "head_dim": 5,
    "dtype": "float7",
    "attention_bias": True,
    "quantization_config": {"quant_method": "x"},
    "tie_word_embeddings": True,
    "num_key_value_heads": 3,
}
ROWS = {
    "negative": -13,
    "zero": 0,
    "fraction": 12.5,
    "more than columns": 99,
    "of another segment": 11,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders and a cache in which nothing is damaged."""
    top = tmp_path_factory.mktemp("whole")
    make_retrofit(top, "llama", layers=[0, -1], local_context=3)
    export(top / "models", top / EXPORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(top / "modules"))
        model = generating_model(layers=[0, -1], local_context=3)
        filled(model, draw_ids(2, 13)).save(top / CACHE, model)
        for name in OPEN:
            OPEN[name](top)
    return top


@pytest.fixture
def top(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(whole / "modules"))
    return shutil.copytree(whole, tmp_path / "top")


def open_base(top: Path) -> None:
    load_base(top / BASE, torch.float32)
    load_tokenizer(top / BASE)


def open_retrofit(top: Path) -> None:
    load_retrofit(top / BASE, top / RETROFIT, torch.float32)


def open_export(top: Path) -> None:
    AutoModelForCausalLM.from_pretrained(top / EXPORT, trust_remote_code=True)


def open_cache(top: Path) -> None:
    InfiniCache.load(top / CACHE, generating_model(layers=[0, -1], local_context=3))


def export_again(top: Path) -> None:
    export_model(top / BASE, top / RETROFIT, top / "again", About())


OPEN = {BASE: open_base, RETROFIT: open_retrofit, EXPORT: open_export, CACHE: open_cache}


def assert_refused(top: Path, file: str, opened: Callable[[Path], None] | None = None) -> None:
    """Open what a damaged file belongs to; the error must name file or folder and a way out."""
    folder = file if file == CACHE else str(Path(file).parent)
    if folder not in (CACHE, EXPORT) and not file.endswith("manifest.json"):
        write_manifest(top / folder)
    with pytest.raises((ValueError, OSError)) as caught:
        (opened or OPEN[folder])(top)
    said = " ".join(str(caught.value).split())
    assert Path(file).name in said or str(top / folder) in said
    assert any(way_out in said for way_out in WAYS_OUT)


def change_tensors(path: Path, change: Callable[[Tensors], object]) -> None:
    """Change tensors, and leave what the file says of itself."""
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    change(tensors)
    if path.name == CACHE:
        del about["sha256"]  # as in the first files, which had no digest
    save_file(tensors, path, about)


def change_json(path: Path, *keys: str, **values: object) -> None:
    """Change values of the mapping below `keys`."""
    about = json.loads(path.read_text())
    found = about
    for key in keys:
        found = found[key]
    found |= values
    path.write_text(json.dumps(about))


WEIGHT_FILES = [BASE_WEIGHTS, f"{RETROFIT}/{WEIGHTS}", EXPORT_WEIGHTS, CACHE]


@pytest.mark.parametrize("change", TENSORS)
@pytest.mark.parametrize("file", WEIGHT_FILES)
def test_tensors_that_do_not_belong_there_are_refused(top, file, change):
    change_tensors(top / file, TENSORS[change])
    assert_refused(top, file)


@pytest.mark.parametrize("change", BYTES)
@pytest.mark.parametrize("file", WEIGHT_FILES)
def test_a_file_that_is_no_safetensors_is_refused(top, file, change):
    (top / file).write_bytes(BYTES[change]((top / file).read_bytes()))
    assert_refused(top, file)


@pytest.mark.parametrize("content", JSONS)
@pytest.mark.parametrize("file", [f"{BASE}/config.json", f"{BASE}/generation_config.json"])
def test_json_of_a_base_that_is_something_else_is_refused(top, file, content):
    (top / file).write_bytes(JSONS[content])
    assert_refused(top, file)


@pytest.mark.parametrize("content", JSONS)
@pytest.mark.parametrize("file", [f"{RETROFIT}/{CONFIG}", f"{RETROFIT}/manifest.json"])
def test_json_of_a_retrofit_that_is_something_else_is_refused(top, file, content):
    (top / file).write_bytes(JSONS[content])
    assert_refused(top, file)


@pytest.mark.parametrize("content", JSONS)
def test_a_base_of_an_unreadable_name_is_not_exported(top, content):
    (top / BASE / "base.json").write_bytes(JSONS[content])
    assert_refused(top, f"{BASE}/base.json", export_again)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", set(JSONS) - {"a key twice", "nan"})
def test_a_tokenizer_that_is_something_else_is_refused(top, content, name):
    (top / BASE / name).write_bytes(JSONS[content])
    assert_refused(top, f"{BASE}/{name}")


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("file", [f"{RETROFIT}/{CONFIG}", f"{EXPORT}/config.json"])
def test_a_form_that_cannot_be_is_refused(top, file, name):
    change_json(top / file, "infini", **{name: FORMS[name]})
    assert_refused(top, file)


@pytest.mark.parametrize("values", [{"gate": "query"}, {"update_rule": "delta"}], ids=str)
def test_another_form_than_the_weights_were_saved_with_is_refused(top, values):
    change_json(top / RETROFIT / CONFIG, "infini", **values)
    assert_refused(top, f"{RETROFIT}/{CONFIG}")


@pytest.mark.parametrize(
    "values",
    [{"format": "5"}, {"base": {}}, {"other_layers": "full"}, {"infini": 7}, {"tensors": {}}],
    ids=str,
)
def test_other_settings_of_a_retrofit_are_refused(top, values):
    change_json(top / RETROFIT / CONFIG, **values)
    if "base" in values:  # names both bases, not the way out
        with pytest.raises(ValueError, match=r"the base of .* must be the one"):
            write_manifest(top / RETROFIT) or open_retrofit(top)
        return
    assert_refused(top, f"{RETROFIT}/{CONFIG}")


@pytest.mark.parametrize("values", [{"infini": None}, {"other_layers": "../x"}], ids=str)
def test_other_settings_of_an_export_are_refused(top, values):
    change_json(top / EXPORT / "config.json", **values)
    assert_refused(top, f"{EXPORT}/config.json")


# An export may be saved again with quantized weights: transformers reads how.
@pytest.mark.parametrize(
    ("folder", "name"),
    [*((BASE, name) for name in CONFIGS), *((EXPORT, x) for x in CONFIGS if x[:5] != "quant")],
)
def test_a_configuration_that_does_not_fit_the_weights_is_refused(top, folder, name):
    change_json(top / folder / "config.json", **{name: CONFIGS[name]})
    assert_refused(top, f"{folder}/config.json")


@pytest.mark.parametrize("values", [{"max_new_tokens": "x"}, {"max_new_tokens": 0}], ids=str)
def test_settings_of_generation_that_cannot_be_are_refused(top, values):
    change_json(top / BASE / "generation_config.json", **values)
    assert_refused(top, f"{BASE}/generation_config.json")


@pytest.mark.parametrize("name", ROWS)
def test_counts_that_do_not_fit_a_cache_are_refused(top, name):
    count = torch.tensor([13, ROWS[name]])
    change_tensors(top / CACHE, lambda tensors: tensors.update(num_tokens=count))
    assert_refused(top, CACHE)


@pytest.mark.parametrize("count", ["-13", "1.5", "0", "x", "9" * 99, ""])
def test_a_cache_that_has_seen_a_strange_number_of_columns_is_refused(top, count):
    with safe_open(top / CACHE, framework="pt") as file:
        about = file.metadata() | {"num_seen": count}
    del about["sha256"]
    save_file(load_file(top / CACHE), top / CACHE, about)
    assert_refused(top, CACHE)


def test_a_flipped_bit_of_a_cache_is_refused(top):
    content = bytearray((top / CACHE).read_bytes())
    content[-50] ^= 1
    (top / CACHE).write_bytes(content)
    assert_refused(top, CACHE)
