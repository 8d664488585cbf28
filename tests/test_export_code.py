"""The code in an exported folder: whole, and in need of nothing but torch and transformers."""

import ast
import re
import sys

import jaxtyping
import pytest
from torch import Tensor

from infini_retrofit.share import export, shapes
from infini_retrofit.share.export import write_code


def test_the_code_imports_only_what_stands_beside_it_or_torch_and_transformers(tmp_path):
    write_code(tmp_path)
    beside = {file.stem for file in tmp_path.glob("*.py")}
    used = set()
    for file in tmp_path.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} <= allowed(), file.name
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] in allowed(), file.name
            elif isinstance(node, ast.ImportFrom):
                used.add(node.module)
    assert used == beside - {"modeling"}


def allowed() -> set[str]:
    return {"torch", "transformers", "safetensors"} | sys.stdlib_module_names


def test_every_name_that_the_code_takes_of_jaxtyping_has_its_stand_in(tmp_path):
    write_code(tmp_path)
    text = "\n".join(file.read_text() for file in tmp_path.glob("*.py"))
    names = {n for line in re.findall(r"from \.shapes import (.*)", text) for n in line.split(", ")}
    assert names
    for name in names:
        assert getattr(shapes, name)[Tensor, "B T"] is Tensor
        assert hasattr(jaxtyping, name)


@pytest.mark.parametrize(
    "line", ["import infini_retrofit.layer.memory", "from infini_retrofit import x"]
)
def test_an_import_that_would_reach_outside_is_noticed(line, tmp_path, monkeypatch):
    source = tmp_path / "modeling.py"
    source.write_text(f"{line}\n")
    monkeypatch.setattr(export, "first_party_files", lambda *_: [source])
    with pytest.raises(AssertionError, match="in a form that is not rewritten"):
        write_code(tmp_path / "out")
