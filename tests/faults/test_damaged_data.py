"""Every file that a stage reads, damaged: no stage accepts one, and none ends in a traceback."""

import random
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from infini_retrofit.pipeline import guard
from infini_retrofit.pipeline.files import MANIFEST, write_manifest
from tests.tiny_project import ROOT, SEGMENT, contents

pytestmark = pytest.mark.faults

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
SPLITS_READ = {
    "prepare_longdocs": {"wikitext": ("train", "val", "test")},
    "distill": {"wikitext": ("train", "val")},
    "finetune": {"longdocs": ("train", "val")},
    "finetune_control": {"longdocs": ("train", "val")},
    "baseline_eval": {"wikitext": ("train", "test"), "longdocs": ("test",)},
    "control_eval": {"wikitext": ("test",), "longdocs": ("test",)},
    "eval_sliding": {"wikitext": ("test",), "longdocs": ("test",)},
    "eval_longcontext": {"wikitext": ("test",)},
    "report": {"longdocs": ("test",)},
}
TABLES = [
    (stage, f"data/{folder}/{split}.parquet")
    for stage, folders in SPLITS_READ.items()
    for folder, splits in folders.items()
    for split in splits
]
OTHERS = [
    (stage, dep)
    for stage in SPLITS_READ
    for dep in PIPELINE[stage]["deps"]
    if dep.endswith((".json", ".tsv")) and not dep.startswith("models/")
]
FLIPS = 4


def flipped(content: bytes, seed: str) -> bytes:
    """Return the bytes with one bit flipped."""
    chosen = random.Random(seed)
    at, bit = chosen.randrange(len(content)), chosen.randrange(8)
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def damaged(content: bytes, seed: str) -> dict[str, bytes]:
    """Return damaged copies of a file by what was done to it."""
    flips = {f"flip {i}": flipped(content, f"{seed} {i}") for i in range(FLIPS)}
    half = len(content) // 2
    return flips | {
        "empty": b"",
        "an empty object": b"{}",
        "a list": b"[]\n",
        "deep": b"[" * 100_000,
        "half": content[:half],
        "a byte more": content + b"1",
        "zeros": content[:half] + b"\0" * (len(content) - half),
    }


def refusal_of(stage: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the sentence with which a stage ends; fail if it ends well, or in a traceback."""
    with pytest.raises(SystemExit) as ended:
        guard.run_stage(import_module(f"stages.{stage}").main)
    capsys.readouterr()
    return str(ended.value)


def check_refused(stage: str, path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a stage on a damaged file: one sentence names the file and a command; nothing changes."""
    before = contents(Path())
    said = refusal_of(stage, capsys)
    assert said.startswith("error: "), damage
    assert str(path) in said, (damage, said)
    assert "run `dvc repro" in said, (damage, said)
    assert len(said) < 600, damage
    assert contents(Path()) == before, damage


@pytest.mark.parametrize(("stage", "name"), TABLES + OTHERS)
def test_a_damaged_file_is_refused(stage, name, project, capsys):
    path = Path(name)
    content = path.read_bytes()
    for damage, found in damaged(content, f"{stage} {name}").items():
        path.write_bytes(found)
        check_refused(stage, path, damage, capsys)
    path.write_bytes(content)


@pytest.mark.parametrize(("stage", "name"), TABLES)
def test_another_file_in_its_place_and_a_damaged_manifest_are_refused(stage, name, project, capsys):
    path = Path(name)
    content, manifest = path.read_bytes(), path.parent / MANIFEST
    for other in {*Path("data").glob("*/*.parquet")} - {path}:
        path.write_bytes(other.read_bytes())
        check_refused(stage, path, f"swapped with {other}", capsys)
    path.write_bytes(content)
    whole = manifest.read_bytes()
    at = whole.index(path.name.encode())
    for seed in range(FLIPS):
        line, after = whole[at : at + 80], whole[at + 80 :]  # the name and most of its sha256
        manifest.write_bytes(whole[:at] + flipped(line, f"{name} {seed}") + after)
        assert f"{path.parent}/" in refusal_of(stage, capsys)
    for damage in (b"", b"{}", b"[]", b"null", b"[" * 100_000, whole[:-3], b"\xff" + whole):
        manifest.write_bytes(damage)
        assert f"{path.parent}/" in refusal_of(stage, capsys)


def with_ids(table: pa.Table, rows: list[object], of: pa.DataType | None = None) -> pa.Table:
    """Return a table with other tokens."""
    ids = pa.array(rows, of or pa.large_list(pa.int32()))
    return table.set_column(table.schema.get_field_index("input_ids"), "input_ids", ids)


def foreign(table: pa.Table) -> dict[str, pa.Table]:
    """Return tables that this pipeline does not write, by what is wrong with each."""
    rows = table["input_ids"].to_pylist()
    first, *rest = rows
    return {
        "rows, got none": table.slice(0, 0),
        "column input_ids of": table.drop_columns(["input_ids"]),
        "got large_list<": with_ids(table, rows, pa.large_list(pa.int64())),
        "got large_list<element: double": with_ids(table, rows, pa.large_list(pa.float64())),
        "got string": with_ids(table, [str(row) for row in rows], pa.string()),
        "an empty one": with_ids(table, [None, *rest]),
        "an empty one ": with_ids(table, [[None, *first[1:]], *rest]),
    }


def strange_ids(table: pa.Table) -> dict[str, pa.Table]:
    """Return tables whose tokens are not those of the base, or not of one length."""
    first, *rest = table["input_ids"].to_pylist()
    found = {
        f"got {strange} in row 0": with_ids(table, [[*first[:-1], strange], *rest])
        for strange in (-1, 1_000, 2**31 - 1, -(2**31))
    }
    if "part" in table.column_names:
        found["of one length"] = with_ids(table, [*rest, first[:-SEGMENT]])
        found["of one length "] = with_ids(table, [*rest, first * 2])
        found["of one length  "] = with_ids(table, [[], first, *rest[1:]])
    return found


@pytest.mark.parametrize(("stage", "name"), TABLES)
def test_a_table_that_the_pipeline_does_not_write_is_refused(stage, name, project, capsys):
    path = Path(name)
    table = pq.read_table(path)
    assert table.num_rows > 1
    cases = foreign(table) | ({} if stage == "prepare_longdocs" else strange_ids(table))
    for fault, found in cases.items():
        pq.write_table(found, path)
        write_manifest(path.parent)
        said = refusal_of(stage, capsys)
        assert fault.strip() in said, (fault, said)
        assert str(path) in said
    path.write_bytes(b"no table")
    write_manifest(path.parent)
    assert "must be a table in parquet" in refusal_of(stage, capsys)
