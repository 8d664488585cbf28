"""The command that reads a document and answers: what it says, and what it keeps."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infini_retrofit.generation import chat
from infini_retrofit.generation.cache import InfiniCache
from infini_retrofit.generation.conversation import Reader, converse
from infini_retrofit.generation.generation import enable_generation
from infini_retrofit.model import checkpoints
from infini_retrofit.model.base import load_base, load_tokenizer
from infini_retrofit.model.checkpoints import load_retrofit, save_retrofit
from infini_retrofit.model.retrofit import infini_modules, insert_infini
from infini_retrofit.pipeline import device as runtime
from infini_retrofit.pipeline.guard import run_stage
from tests.reference import infini_params
from tests.tiny import tiny_base_folder

ROOT = Path(__file__).parent.parent
TEXT = "The quick brown fox jumps over the lazy dog. " * 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Write a base and a retrofit of it."""
    top = tmp_path_factory.mktemp("models")
    base = tiny_base_folder(top / "base")
    model, params = load_base(base, torch.float32), infini_params(layers=[0, 2])
    insert_infini(model, params)
    with torch.no_grad():
        for module in infini_modules(model).values():
            module.gate_logit.add_(1.0)
    save_retrofit(model, params, base, top / "retrofit")
    return base, top / "retrofit"


@pytest.fixture
def reader(folders) -> Reader:
    model, params = load_retrofit(*folders, torch.float32)
    enable_generation(model, params)
    return Reader(model, load_tokenizer(folders[0]), 6, 0.0, False)


def run_chat(monkeypatch, folders, lines: str, *options: object) -> None:
    base, retrofit = folders
    argv = ["chat", str(retrofit), "--base", str(base), "--max-new-tokens", "6", *map(str, options)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    monkeypatch.setattr(runtime, "start_run", lambda: (torch.device("cpu"), torch.float32))
    chat.main()


def answers(reader: Reader, text: str, prompts: list[str], goes_on: bool, capsys) -> list[str]:
    cache = reader.read(text)
    capsys.readouterr()
    converse(reader, cache, prompts, goes_on)
    return capsys.readouterr().out.splitlines()


def continue_ids(reader: Reader, ids: list[int]) -> list[int]:
    """Go on from a whole text without a cache; return text and answer."""
    options = {"max_new_tokens": 6, "use_cache": False, "pad_token_id": 0}
    return reader.model.generate(torch.tensor([ids]), **options)[0].tolist()


def expected(reader: Reader, *parts: str) -> str:
    """Answer after some parts of a text without a cache, and after answers to all but the last."""
    ids = reader._encode(parts[0])
    for part in parts[1:]:
        before = ids + reader._encode(part)
        ids = continue_ids(reader, before)
    return reader.tokenizer.decode(ids[len(before) :], skip_special_tokens=True)


def test_an_answer_is_what_the_model_makes_of_the_document_and_the_prompt(reader, capsys):
    (got,) = answers(reader, TEXT, ["The dog"], False, capsys)
    assert got == expected(reader, TEXT, "The dog")
    assert got != expected(reader, "", "The dog")


def test_each_prompt_starts_from_the_document_unless_told_to_go_on(reader, capsys):
    apart = answers(reader, TEXT, ["The dog", "and then"], False, capsys)
    assert apart[1] == expected(reader, TEXT, "and then")
    together = answers(reader, TEXT, ["The dog", "and then"], True, capsys)
    assert together[0] == apart[0]
    assert together[1] == expected(reader, TEXT, "The dog", "and then")
    assert together[1] != apart[1]


def test_reading_shows_how_fast_and_how_much_is_kept(reader, capfd):
    cache = reader.read(TEXT)
    shown = capfd.readouterr().err
    assert re.search(rf"{cache.num_seen}/{cache.num_seen} .*tokens/s", shown)
    assert f"{cache.num_bytes / 2**10:,.0f} KiB" in shown


def test_what_was_read_can_be_kept_and_asked_again(monkeypatch, folders, tmp_path, capsys):
    document, kept = tmp_path / "book.txt", tmp_path / "book.cache"
    document.write_text(TEXT)
    run_chat(monkeypatch, folders, "The dog\n\n", "--document", document, "--cache", kept)
    first = capsys.readouterr().out
    run_chat(monkeypatch, folders, "The dog\n", "--cache", kept)
    assert capsys.readouterr().out == first
    assert len(first.splitlines()) == 1
    with pytest.raises(FileExistsError, match="leave --document out"):
        run_chat(monkeypatch, folders, "", "--document", document, "--cache", kept)


def test_sampling_and_templates_reach_the_model(reader, monkeypatch, capsys):
    seen = {}
    generate = reader.model.generate
    monkeypatch.setattr(
        reader.model, "generate", lambda ids, **k: seen.update(k, ids=ids) or generate(ids, **k)
    )
    template = "[{{ messages[0]['content'] }}]"
    reader.tokenizer.chat_template = template
    warm = Reader(reader.model, reader.tokenizer, 3, 0.7, True)
    warm.answer("The dog", InfiniCache(reader.model), [])
    assert (seen["do_sample"], seen["temperature"], seen["max_new_tokens"]) == (True, 0.7, 3)
    assert reader.tokenizer.decode(seen["ids"][0]) == "[The dog]"
    capsys.readouterr()


def test_the_example_of_the_readme_runs(folders, tmp_path, monkeypatch, capsys):
    section = (ROOT / "README.md").read_text().split("\n## Long texts and generation")[1]
    example = section.split("```python\n")[1].split("```")[0]
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(folders[0])
    (tmp_path / "models" / "finetuned").symlink_to(folders[1])
    (tmp_path / "book.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    first, second = capsys.readouterr().out.split("In short,")[1:]
    assert first == second


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("is_kept", [False, True], ids=["reading", "answering"])
def test_ctrl_c_while_reading_or_answering_leaves_nothing_half(
    monkeypatch, folders, tmp_path, is_kept
):
    (tmp_path / "book.txt").write_text(TEXT)
    kept, load, calls = tmp_path / "book.cache", load_retrofit, []

    def interrupt(module, args, kwargs) -> None:
        calls.append(kwargs["input_ids"].shape[1])
        if calls[-1] == 1 if is_kept else len(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    def loaded(*args: object) -> tuple:
        model, params = load(*args)
        model.base_model.register_forward_pre_hook(interrupt, with_kwargs=True)
        return model, params

    monkeypatch.setattr(checkpoints, "load_retrofit", loaded)
    options = ("--document", tmp_path / "book.txt", "--cache", kept)
    with pytest.raises(SystemExit) as left:
        run_stage(lambda: run_chat(monkeypatch, folders, "The dog\n", *options))
    assert left.value.code == 130
    assert calls[1] > 1
    assert kept.exists() == is_kept
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ctrl_c_leaves_without_a_traceback(folders, tmp_path):
    document = tmp_path / "book.txt"
    document.write_text(TEXT)
    base, retrofit = folders
    command = [
        sys.executable,
        "-m",
        "infini_retrofit.generation.chat",
        str(retrofit),
        "--base",
        str(base),
    ]
    run = subprocess.Popen(
        [*command, "--document", str(document)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    said = b""
    while b"kept" not in said:
        said += os.read(run.stderr.fileno(), 1000)
        assert run.poll() is None, said
    run.send_signal(signal.SIGINT)
    run.wait(timeout=60)
    rest = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert b"Traceback" not in said + rest
