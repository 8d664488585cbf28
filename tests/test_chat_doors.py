"""What the chat command refuses before a model is loaded, and how soon it looks at its arguments.

No model is needed here: none is ever reached.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from infini_retrofit.generation import chat
from infini_retrofit.model import checkpoints
from tests.tiny_project import ROOT


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "load_retrofit", pytest.fail)


def run_chat(monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["chat", "models/finetuned", *map(str, options)])
    chat.main()


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, r"book\.txt is missing: --document must name a text file"),
        (b"", ValueError, r"book\.txt must hold text, got 0 characters"),
        (b" \n\n", ValueError, r"book\.txt must hold text, got 3 characters of white space"),
        (b"caf\xe9 au lait", ValueError, r"must be text in UTF-8, got byte 0xe9 at position 3"),
    ],
    ids=["missing", "empty", "white", "latin-1"],
)
def test_documents_that_cannot_be_read_are_refused(monkeypatch, tmp_path, content, error, message):
    document = tmp_path / "book.txt"
    if content is not None:
        document.write_bytes(content)
    with pytest.raises(error, match=message):
        run_chat(monkeypatch, "--document", document)


def test_a_folder_is_no_document(monkeypatch, tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder: --document must name a text file"):
        run_chat(monkeypatch, "--document", tmp_path)


@pytest.mark.parametrize("content", [None, "folder", b"", b"text", "weights"], ids=str)
def test_what_is_no_cache_is_refused_before_a_model_is_loaded(monkeypatch, tmp_path, content):
    path, message = tmp_path / "book.cache", r"book\.cache must be a cache that .* wrote, got"
    if content is None:
        message = r"book\.cache is missing: InfiniCache\.save writes .*\.chat with --document"
    elif content == "folder":
        path.mkdir()
    elif content == "weights":
        save_file({"q_proj.weight": torch.ones(2, 3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_chat(monkeypatch, "--cache", path)


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_place_where_no_cache_can_be_written_is_refused_before_reading(
    monkeypatch, tmp_path, folder
):
    document = tmp_path / "file"
    document.write_text("The quick brown fox")
    options = ("--document", document, "--cache", tmp_path / folder / "book.cache")
    with pytest.raises(OSError, match=r"^cannot write to .*book\.cache: "):
        run_chat(monkeypatch, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--document or --cache must be given"),
        (("--cache", "x", "--max-new-tokens", 0), "--max-new-tokens must be at least 1, got 0"),
        (("--cache", "x", "--temperature", -1), r"--temperature must be at least 0, got -1\.0"),
        (("--cache", "x", "--temperature", "nan"), "--temperature must be at least 0, got nan"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit):
        run_chat(monkeypatch, *options)
    assert re.search(message, capsys.readouterr().err)


def run_and_list_imports(folder: Path, *words: str) -> tuple[int, set[str]]:
    """Run the command in a process of its own; return its exit code and what it imported."""
    command = [sys.executable, "-X", "importtime", "-m", "infini_retrofit.generation.chat", *words]
    env = {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return run.returncode, set(re.findall(r"\| +(\w+)$", run.stderr, re.MULTILINE))


@pytest.mark.parametrize(
    ("words", "code"),
    [("--help", 0), ("models/finetuned", 2), ("models/finetuned --document nowhere", 1)],
)
def test_arguments_are_looked_at_before_torch_is_imported(tmp_path, words, code):
    found, imported = run_and_list_imports(tmp_path, *words.split())
    assert found == code
    assert "argparse" in imported
    assert not imported & {"torch", "transformers"}


def test_torch_would_have_been_noticed(tmp_path):
    (tmp_path / "book.cache").write_bytes(b"text")
    found, imported = run_and_list_imports(tmp_path, "models/finetuned", "--cache", "book.cache")
    assert found == 1
    assert imported >= {"torch", "transformers"}
