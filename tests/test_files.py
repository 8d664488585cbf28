"""Files are written whole or not at all, and a changed file is found."""

import contextlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from infini_retrofit.pipeline.files import (
    MANIFEST,
    read_json,
    read_sealed,
    seal_results,
    verify_manifest,
    verify_results,
    whole_folder,
    write_manifest,
    write_metrics,
    write_rows,
    write_sealed,
)

ROWS = [{"epoch": 1, "split": "val", "ppl": 2.5}, {"epoch": 2, "split": "val", "ppl": 0.1}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.bin").write_bytes(b"1234567")
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path)
    return tmp_path


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_and_leaves_the_old_file(tmp_path, value):
    metrics, rows = tmp_path / "a.json", tmp_path / "a.tsv"
    write_metrics(metrics, {"val_ppl": 7.0})
    write_rows(rows, ROWS)
    before = metrics.read_bytes(), rows.read_bytes()
    with pytest.raises(ValueError, match=r"a\.json: inner: val_ppl must be finite, got"):
        write_metrics(metrics, {"inner": {"val_ppl": value}})
    with pytest.raises(ValueError, match=r"a\.tsv: ppl must be finite, got"):
        write_rows(rows, [*ROWS, {"epoch": 3, "split": "val", "ppl": value}])
    assert (metrics.read_bytes(), rows.read_bytes()) == before


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_metrics(path, {"val_ppl": 7.0})
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_metrics(path, {"val_ppl": 8.0})
    assert json.loads(path.read_text()) == {"val_ppl": 7.0}


def test_what_a_killed_run_began_to_write_is_no_file_and_no_folder_keeps_it(folder):
    (folder / "weights" / "model.bin.partial").write_bytes(b"123")
    verify_manifest(folder)
    path = folder / "new"
    with contextlib.suppress(KeyboardInterrupt), whole_folder(path) as partial:
        partial.mkdir()
        raise KeyboardInterrupt
    assert not partial.exists()
    (partial / "old").mkdir(parents=True)
    with whole_folder(path) as again:
        assert not again.exists()
        again.mkdir()
    assert list(path.iterdir()) == []
    assert not partial.exists()


def test_metrics_are_sorted_json_and_rows_are_tab_separated(tmp_path):
    path = tmp_path / "metrics" / "distill.json"
    write_metrics(path, {"b": 1, "a": {"d_ppl": 2.5, "c_ppl": 0.1}})
    names = ("a", "b"), ("c_ppl", "d_ppl")
    assert (tuple(json.loads(path.read_text())), tuple(json.loads(path.read_text())["a"])) == names
    write_rows(tmp_path / "plots" / "a.tsv", ROWS)
    text = (tmp_path / "plots" / "a.tsv").read_bytes()
    assert text == b"epoch\tsplit\tppl\n1\tval\t2.5\n2\tval\t0.1\n"
    write_rows(tmp_path / "b.tsv", [], ("epoch", "ppl"))
    assert (tmp_path / "b.tsv").read_bytes() == b"epoch\tppl\n"


def test_one_flipped_bit_is_found_and_named(folder):
    verify_manifest(folder)
    write_manifest(folder)
    verify_manifest(folder)
    assert {*json.loads((folder / MANIFEST).read_text())} == {"config.json", "weights/model.bin"}
    (folder / "weights" / "model.bin").write_bytes(b"1234566")
    with pytest.raises(ValueError, match=r"weights/model\.bin differs .* `dvc repro x`"):
        verify_manifest(folder, "dvc repro x")


def test_a_missing_or_an_added_file_is_named(folder):
    (folder / "config.json").rename(folder / "settings.json")
    with pytest.raises(ValueError, match=r"config\.json is missing: delete"):
        verify_manifest(folder)
    (folder / "settings.json").rename(folder / "config.json")
    (folder / "extra").write_text("")
    with pytest.raises(ValueError, match="extra is not in its manifest"):
        verify_manifest(folder)
    verify_manifest(folder, names=["config.json"])
    for name, fault in (("extra", "is not in its manifest"), ("none", "is missing")):
        with pytest.raises(ValueError, match=f"{name} {fault}"):
            verify_manifest(folder, names=["config.json", name])
    message = r"models/base/manifest\.json is missing: run `dvc repro prepare_base`"
    with pytest.raises(FileNotFoundError, match=message):
        verify_manifest(folder / "models" / "base", "dvc repro prepare_base")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A file's fields."""

    tokens: int
    share: float


UNREADABLE = {
    b"": "not valid JSON",
    b'{"tokens": 3, "share": 0.5': "not valid JSON",
    b"\xff\xfe{\0}\0": "not valid JSON",
    b"[" * 100_000: "nested too deeply",
    b'{"tokens": ' * 300 + b"3" + b"}" * 300: "recursion limit",
    b'{"tokens": 3, "tokens": 4, "share": 0.5}': "a key stands twice",
    b'{"tokens": 3, "share": NaN}': "NaN is no number",
    b'{"tokens": 3, "share": 1e999}': "share must be a valid number",
    b'{"tokens": true, "share": 0.5}': "tokens must be a valid integer, got True",
    b'{"tokens": 3}': "share is missing",
    b'{"tokens": 3, "share": 0.5, "more": 1}': "more is unknown",
    b"[3, 0.5]": "must be an object",
    b" " * (1 << 24) + b"{}": "at most 16777216 bytes",
}


@pytest.mark.parametrize("content", UNREADABLE, ids=lambda content: str(content[:45]))
def test_a_damaged_json_file_is_one_short_sentence(content, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b'{"tokens": 3, "share": 0.5}')
    assert read_json(path, Plan) == Plan(tokens=3, share=0.5)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(UNREADABLE[content])) as caught:
        read_json(path, Plan, "dvc repro x")
    said = str(caught.value)
    assert said.startswith(str(path))
    assert said.endswith(": delete it and run `dvc repro x`")
    assert len(said) < 400
    assert "\n" not in said


def test_a_changed_byte_of_a_plan_is_refused_though_it_may_still_be_a_plan(tmp_path):
    path, plan = tmp_path / "plan.json", Plan(tokens=3, share=1e-5)
    write_sealed(path, plan)
    assert read_sealed(path, Plan, "dvc repro x") == plan
    content = path.read_bytes()
    for at, bit in itertools.product(range(len(content)), range(8)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        with pytest.raises(ValueError, match=r"plan\.json .* run `dvc repro x`$"):
            read_sealed(path, Plan, "dvc repro x")
    path.write_text('{"tokens": 3, "share": 1e-05}')
    with pytest.raises(ValueError, match="differs from its sha256: delete it"):
        read_sealed(path, Plan, "dvc repro x")


def test_results_are_those_that_their_stage_wrote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics, rows, more = Path("metrics/a.json"), Path("plots/a.tsv"), Path("plots/more.tsv")
    write_metrics(metrics, {"ppl": 7.0})
    write_rows(rows, ROWS)
    write_rows(more, ROWS)
    seal_results("a", [metrics, rows])
    verify_results("a", [metrics])
    with pytest.raises(ValueError, match=r"plots/more\.tsv differs from its manifest"):
        verify_results("a", [more])
    write_rows(rows, ROWS[:1])
    message = r"plots/a\.tsv differs .*: delete data/a\.manifest\.json and run `dvc repro a`"
    with pytest.raises(ValueError, match=message):
        verify_results("a", [metrics])
    rows.unlink()
    with pytest.raises(FileNotFoundError, match=r"plots/a\.tsv is missing: run `dvc repro a`"):
        verify_results("a", [metrics])
