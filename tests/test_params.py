"""Parameters: bad ones are refused by name, and DVC reads the same values."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from infini_retrofit.pipeline.params import load_choice, load_presets, load_section, read_params


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A nested section."""

    new: float
    rest: float


@dataclass(frozen=True, kw_only=True)
class Training:
    """A section with one field of each kind."""

    lr: float
    epochs: int
    memory: Literal["on", "off"]
    layers: list[int] | Literal["all"]
    heads: tuple[int, ...]
    fast: bool
    lr_scale: Scale
    shift: Literal[1, 2] = 1


@dataclass(frozen=True, kw_only=True)
class Local:
    """A preset."""

    path: str


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Another preset."""

    repo_id: str
    tokens: int


KINDS = {"local": Local, "hub": Hub}
GOOD = {
    "lr": "1e-4",
    "epochs": "50",
    "memory": "on",
    "layers": "[0, -1]",
    "heads": "[3, 5]",
    "fast": "true",
    "lr_scale": "{new: 1, rest: 0.5}",
    "shift": "2",
}
PRESETS = """
model: small
models:
  small: {source: local, path: here}
  large: {source: hub, repo_id: a/b, tokens: 7}
"""


def write_section(path: Path, **changes: str | None) -> Path:
    lines = [f"  {key}: {text}" for key, text in (GOOD | changes).items() if text is not None]
    path.write_text("training:\n" + "\n".join(lines) + "\n")
    return path


def write_presets(path: Path, old: str = "", new: str = "") -> Path:
    assert old in PRESETS
    path.write_text(PRESETS.replace(old, new))
    return path


def test_good_parameters_load_whole_or_by_dotted_names(tmp_path):
    path = write_section(tmp_path / "params.yaml")
    params = load_section(Training, "training", path)
    assert params == Training(
        lr=1e-4,
        epochs=50,
        memory="on",
        layers=[0, -1],
        heads=(3, 5),
        fast=True,
        lr_scale=Scale(new=1.0, rest=0.5),
        shift=2,
    )
    assert type(params.lr_scale.new) is float
    assert load_section(int, "training.epochs", path) == 50
    assert load_section(Scale, "training.lr_scale", path) == Scale(new=1.0, rest=0.5)
    for name in ("training.epoch", "training.epochs.x"):
        with pytest.raises(ValueError, match=rf"must have the key {name}, which is missing"):
            load_section(int, name, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": "fast"}, "lr must be a valid number, got 'fast'"),
        ({"lr": "-.inf"}, "lr must be a finite number, got -inf"),
        ({"epochs": "1e1"}, "epochs must be a valid integer, got 10.0"),
        ({"epochs": "true"}, "epochs must be a valid integer, got True"),
        ({"memory": "maybe"}, "memory must be 'on' or 'off', got 'maybe'"),
        (
            {"layers": "[0, x]"},
            "layers.1 must be a valid integer, got 'x'; "
            "training.layers must be 'all', got [0, 'x']",
        ),
        ({"heads": "[3, false]"}, "heads.1 must be a valid integer, got False"),
        ({"lr_scale": "{new: 1}"}, "lr_scale.rest is missing"),
        ({"lr_scale": "{new: a, rest: 1}"}, "lr_scale.new must be a valid number, got 'a'"),
        ({"lerning": "1", "lr": None}, "lr is missing; training.lerning is unknown"),
        # A default is for callers in Python; to Python, True is 1.
        ({"shift": None}, "shift is missing"),
        ({"shift": "true"}, "shift must be a number, got True"),
    ],
)
def test_bad_parameters_are_refused_by_name(tmp_path, change, message):
    path = write_section(tmp_path / "params.yaml", **change)
    with pytest.raises(ValueError, match=f"^{re.escape('training.' + message)}$"):
        load_section(Training, "training", path)


def test_the_chosen_preset_is_read_as_its_source_says(tmp_path):
    path = write_presets(tmp_path / "params.yaml")
    assert load_choice(KINDS, "model", "models", path) == Local(path="here")
    other = write_presets(tmp_path / "other.yaml", "model: small", "model: large")
    assert load_choice(KINDS, "model", "models", other) == Hub(repo_id="a/b", tokens=7)
    assert load_presets(KINDS, "models", path).keys() == {"small", "large"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model: small", "model: tiny", r"model must be one of large, small .* got 'tiny'"),
        ("source: local", "source: []", r"small\.source must be one of hub, local, got \[\]"),
        ("small: {", "a.b: {", r"models must have keys of letters, digits, - and _, got 'a\.b'"),
        ("source: local", "source: zip", r"models\.small\.source must be one of hub, local, got"),
        ("source: local, ", "", r"models\.small\.source must be one of hub, local, got None"),
        ("path: here", "path: 3", r"models\.small\.path must be a valid string, got 3"),
        ("path: here", "path: a, x: b", r"models\.small\.x is unknown"),
        ("tokens: 7", "tokens: x", r"models\.large\.tokens must be a valid integer"),
    ],
)
def test_bad_presets_are_refused_by_name(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=message):
        load_choice(KINDS, "model", "models", write_presets(tmp_path / "params.yaml", old, new))


def test_yaml_means_what_it_means_to_dvc(tmp_path):
    from dvc.utils.serialize import load_yaml

    path = tmp_path / "params.yaml"
    path.write_text("\ufeffa: 1e-4\nb: on\nc: yes\nd: 010\ne: 0o10\nf: ~\ng: 1:30\nh: '1'\ni: .5\n")
    assert read_params(path) == load_yaml(str(path))
    assert (read_params(path)["a"], read_params(path)["b"]) == (1e-4, "on")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: 1\nb: 2\na: 3\n", r"must be plain YAML in UTF-8: found duplicate key .*, line 3$"),
        (b"a: [1\n", r"must be plain YAML"),
        (b"- 1\n", r"must be a mapping of keys to values, got \[1\]"),
        (b"a: \xff\n", r"must be plain YAML in UTF-8: "),
        (b"", r"must be a mapping of keys to values, got an empty file"),
        (b"a: " + b"9" * 5000, r"must be plain YAML in UTF-8: Exceeds the limit"),
        (b"a:\n- " + b"[" * 20_000, r"line 2 is nested more than 10 levels deep"),
        (b"a: &x {b: 1}\nc: *x\n", r"line 2 has the alias \*x: write its value out"),
        (b"a: !!python/name:os.system\n", r"line 1 has the tag \S*os\.system: write the value"),
        (b"#" * 100_001, r"must have at most 100,000 bytes, got 100,001"),
        (b"a: {b: 2020-01-01}\n", r"^a\.b must be a plain value, got a date: quote it"),
        (b"a: {2: 1}\n", r"^'a\.2' must be a key of text, got 2"),
        (b'a: [1, "x\\ny"]\n', r"^a\.1 must be text without control characters, got 'x\\ny'"),
        (b"a: " + b"x" * 1001, r"^a must have at most 1000 characters"),
        (b"a: 9" + b"0" * 18, r"^a must be at most 4,294,967,296 in size, got 9000"),
    ],
)
def test_a_missing_or_broken_file_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "params.yaml"
    with pytest.raises(FileNotFoundError, match=r"params\.yaml is missing: run this in"):
        read_params(path)
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_params(path)
    assert "\n" not in str(caught.value)
