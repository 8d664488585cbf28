"""Prepared tokens as tensors: their order and their number."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infini_retrofit.pipeline.files import write_manifest
from infini_retrofit.pipeline.tokens import read_documents, read_samples, read_sources, read_stream
from infini_retrofit.texts.splits import Document, TokenizedArticle, write_rows

LENGTHS = (7, 3, 12)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Articles a, b and c of different lengths, numbered through."""
    ids = np.split(np.arange(sum(LENGTHS), dtype=np.int32), np.cumsum(LENGTHS)[:-1])
    articles = [TokenizedArticle(t, t, i) for t, i in zip("abc", ids, strict=True)]
    write_rows(tmp_path, "train", articles)
    write_manifest(tmp_path)
    return tmp_path / "train.parquet"


def test_a_stream_is_the_articles_one_after_another(path):
    assert read_stream(path, 22).tolist() == list(range(22))
    assert read_stream(path, 22, 9).tolist() == list(range(9))


def test_samples_come_from_as_many_articles_as_possible_and_are_whole(path):
    whole = [[0, 1, 2], [7, 8, 9], [10, 11, 12], [3, 4, 5], [13, 14, 15], [16, 17, 18]]
    whole += [[19, 20, 21]]
    assert read_samples(path, 22, 3, 99).tolist() == whole
    assert read_samples(path, 22, 3, 4).tolist() == whole[:4]


def test_samples_longer_than_every_article_are_refused(path):
    message = r"distill\.tokens_per_sample must be at most .*, 12 tokens, got 13"
    assert read_samples(path, 22, 12, 9).shape == (1, 12)
    with pytest.raises(ValueError, match=message):
        read_samples(path, 22, 13, 9)


def test_documents_are_the_first_rows_and_each_has_its_source(tmp_path):
    rows = np.arange(12, dtype=np.int32).reshape(4, 3)
    pieces = [("b", 0), ("a", 0), ("b", 1), ("c", 0)]
    documents = [Document(*piece, row) for piece, row in zip(pieces, rows, strict=True)]
    documents[3] = replace(documents[3], source="package")
    write_rows(tmp_path, "test", documents)
    write_manifest(tmp_path)
    path = tmp_path / "test.parquet"
    assert read_documents(path, 22, 3).tolist() == rows[:3].tolist()
    assert read_sources(path, 3) == ["b", "a", "b"]
    assert read_sources(path, 9) == ["b", "a", "b", "package"]


def rewritten(path: Path, **columns: pa.Array) -> None:
    """Replace columns of a table, and its manifest."""
    table = pq.read_table(path)
    names = table.column_names
    arrays = [columns.get(name, table[name]) for name in names]
    pq.write_table(pa.table(dict(zip(names, arrays, strict=True))), path)
    write_manifest(path.parent)


def test_a_flipped_bit_is_refused_and_so_is_a_table_without_a_manifest(path):
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    for read in (lambda: read_stream(path, 22), lambda: read_sources(path, 9)):
        with pytest.raises(ValueError, match=r"train\.parquet differs from its manifest .* run"):
            read()
    path.with_name("manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest\.json is missing: run `dvc repro"):
        read_stream(path, 22)


IDS = pa.large_list(pa.int32())
STRANGE = {
    "column input_ids of large_list<.*int32.*>, got .*int64": (pa.large_list(pa.int64()), [[0]]),
    "must hold token ids in 0..21, .* got 22 in row 1": (IDS, [[0], [22], [1]]),
    "must hold token ids in 0..21, .* got -1 in row 2": (IDS, [[0], [2], [1, -1]]),
    "must have a value in each cell of input_ids": (IDS, [[0], [None], [1]]),
    r"documents of one length \(2 tokens\), got 1 in row 2": (IDS, [[0, 1], [2, 3], [4]]),
}


@pytest.mark.parametrize("fault", STRANGE)
def test_a_table_of_another_pipeline_is_refused_by_row(fault, path):
    of, rows = STRANGE[fault]
    rewritten(path, input_ids=pa.array(rows * (3 // len(rows)), of))
    with pytest.raises(ValueError, match=rf"train\.parquet must .*{fault.removeprefix('must ')}"):
        read_documents(path, 22, 2)


def test_a_table_without_rows_is_refused(path):
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    write_manifest(path.parent)
    with pytest.raises(ValueError, match=r"train\.parquet must have rows, got none: delete"):
        read_samples(path, 22, 3, 99)
