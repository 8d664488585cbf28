"""The notebook runs from its first cell to its last, without a network."""

import json
import socket
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "retrofit_your_model.ipynb"


def test_the_notebook_runs_offline_and_what_it_exports_writes_the_same(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    names: dict[str, object] = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
    said = capsys.readouterr().out
    own, off = (float(line.split()[-1]) for line in said.splitlines() if "perplexity" in line)
    assert own != off
    assert said.endswith("\nTrue\n")
