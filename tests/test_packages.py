"""Python sources of installed packages as a corpus."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from infini_retrofit.texts.articles import read_splits
from infini_retrofit.texts.corpora import PackagesCorpus

ROOT = Path(__file__).parent.parent


def source(*names: str) -> str:
    return "".join(f"def {name}(first_argument, second_argument): pass\n" for name in names)


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> PackagesCorpus:
    """Install packages of a few files each, and name them as a corpus."""
    shared = ["s1", "s2", "s3"]
    packages = {
        "train-a": {"a.py": source(*shared, "o"), "b.py": source(*"abc"), "c.py": source(*"efg")},
        "val-a": {"a.py": source(*"ijkl"), "b.py": source(*"mnop"), "notes.txt": source(*"tuv")},
        "test-a": {
            **{"a.py": source(*shared), "short.py": "x = 1\n", "tests/a.py": source(*"qrs")},
            **{f"{n}.py": source(*(f"{n}{i}" for i in range(4))) for n in "xyz"},
        },
    }
    for name, files in packages.items():
        module = name.replace("-", "_")
        about = tmp_path / f"{module}-1.2.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        for path, text in files.items():
            (tmp_path / module / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / module / path).write_text(text)
        (about / "RECORD").write_text("".join(f"{module}/{path},,\n" for path in files))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    splits = {split: [f"{split}-a==1.2"] for split in ("train", "val", "test")}
    return PackagesCorpus(**splits, min_characters=100, files_per_package=4)


def test_tests_short_files_and_near_copies_of_another_split_are_left_out(corpus, capsys):
    found = {split: {a.title for a in of} for split, of in read_splits(corpus).items()}
    assert found == {
        "train": {"train-a: train_a/b.py", "train-a: train_a/c.py"},
        "val": {"val-a: val_a/a.py", "val-a: val_a/b.py"},
        "test": {f"test-a: test_a/{name}.py" for name in "axyz"},
    }
    assert "train-a==1.2: 1 of 3 files are near copies" in capsys.readouterr().err


def test_no_package_makes_up_a_split(corpus):
    splits = read_splits(replace(corpus, files_per_package=2))
    assert [len(of) for of in splits.values()] == [2, 2, 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test-a==1.3", "got test-a==1.3: 1.2 is installed; run `python -m pip install"),
        ("test-b==1.2", "got test-b==1.2: run `python -m pip install"),
    ],
)
def test_another_version_is_refused(corpus, name, message):
    with pytest.raises(ValueError, match=message):
        read_splits(replace(corpus, test=[name]))


def test_a_package_in_two_splits_is_refused(corpus):
    with pytest.raises(ValueError, match="name a package once, got val-a twice"):
        replace(corpus, train=["val-a==1.1"])


def test_the_packages_of_the_preset_are_those_that_are_installed_with_the_project():
    preset = yaml.safe_load((ROOT / "params.yaml").read_text())["corpora"]["python-sources"]
    pinned = (ROOT / "requirements.txt").read_text().lower().splitlines()
    assert {p for split in ("train", "val", "test") for p in preset[split]} <= set(pinned)
