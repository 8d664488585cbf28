"""The command that reads a document and answers: what it says, keeps and refuses."""

import io
import re
import signal
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from infini_retrofit.generation import chat, conversation
from infini_retrofit.generation.cache import InfiniCache
from infini_retrofit.generation.conversation import Conversation, Reader
from infini_retrofit.generation.generation import enable_generation
from infini_retrofit.model.base import load_tokenizer
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.pipeline.guard import run_stage
from tests.tiny_export import make_retrofit
from tests.tiny_project import ROOT

TEXT = "The quick brown fox jumps over the lazy dog. " * 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    top = tmp_path_factory.mktemp("top")
    torch.manual_seed(0)  # weights whose answers are lines: before the seed of each test
    make_retrofit(top, "llama", layers=[0, 2])
    return top / "models/base", top / "models/finetuned"


@pytest.fixture
def reader(folders) -> Reader:
    model, params = load_retrofit(*folders, torch.float32)
    enable_generation(model, params)
    options = Namespace(max_new_tokens=3, temperature=0.7, template=True)
    return Reader(model, load_tokenizer(folders[0]), options)


@pytest.fixture
def document(tmp_path) -> Path:
    (tmp_path / "book.txt").write_text(TEXT)
    return tmp_path / "book.txt"


def run_chat(monkeypatch, folders, lines: str, *options: object) -> None:
    base, retrofit = folders
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    monkeypatch.setattr(conversation, "start_run", lambda: (torch.device("cpu"), torch.float32))
    words = [retrofit, "--base", base, "--max-new-tokens", 6, *options]
    chat.main([str(word) for word in words])


def expected(reader: Reader, *parts: str) -> str:
    """Answer after some parts of a text without a cache, and after answers to all but the last."""
    options = {"max_new_tokens": 6, "use_cache": False, "pad_token_id": 0}
    ids = reader.encode(parts[0])
    for part in parts[1:]:
        before = ids + reader.encode(part)
        ids = reader.model.generate(torch.tensor([before]), **options)[0].tolist()
    return reader.tokenizer.decode(ids[len(before) :], skip_special_tokens=True)


def test_each_prompt_starts_from_the_document_unless_told_to_go_on(
    monkeypatch, folders, document, reader, capsys
):
    answers = []
    for options in ((), ("--continue",)):
        options = ("--document", document, *options)
        run_chat(monkeypatch, folders, "The dog\n\nand then\n", *options)
        answers.append(capsys.readouterr().out.rstrip("\n").split("\n"))
    apart, together = answers
    assert apart == [expected(reader, TEXT, "The dog"), expected(reader, TEXT, "and then")]
    assert apart[0] != expected(reader, "", "The dog")
    assert together == [apart[0], expected(reader, TEXT, "The dog", "and then")]
    assert together[1] != apart[1]


def test_reading_is_shown_and_sampling_and_templates_reach_the_model(reader, monkeypatch, capfd):
    cache = reader.read(TEXT)
    shown = capfd.readouterr().err
    assert re.search(rf"{cache.num_seen}/{cache.num_seen} .*tokens/s", shown)
    assert f"{cache.num_bytes / 2**10:,.0f} KiB" in shown
    seen = {}
    generate = reader.model.generate
    monkeypatch.setattr(
        reader.model, "generate", lambda ids, **k: seen.update(k, ids=ids) or generate(ids, **k)
    )
    reader.tokenizer.chat_template = "[{{ messages[0]['content'] }}]"
    Conversation(reader, InfiniCache(reader.model)).answer("The dog")
    assert (seen["do_sample"], seen["temperature"], seen["max_new_tokens"]) == (True, 0.7, 3)
    assert reader.tokenizer.decode(seen["ids"][0]) == "[The dog]"


BEGIN = "{{ bos_token }}{% if messages[0]['role'] != 'system' %}system: Be kind.\n{% endif %}"
TURNS = "{% for m in messages %}{{ m['role'] }}: CONTENT\n{% endfor %}assistant: "


@pytest.mark.parametrize(
    ("content", "is_read_again"),
    [("{{ m['content'] }}", False), ("{{ messages | length }}{{ m['content'] }}", True)],
    ids=["grows", "spells earlier turns otherwise"],
)
def test_turns_read_what_the_template_adds_and_no_system_prompt_twice(
    reader, monkeypatch, capsys, content, is_read_again
):
    reader.tokenizer.chat_template = BEGIN + TURNS.replace("CONTENT", content)
    reader.tokenizer.bos_token = "Once upon"
    document, read = reader.read(TEXT), []
    body = reader.model.base_model
    body.register_forward_pre_hook(
        lambda _, args, kwargs: read.extend(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    conversation = Conversation(reader, document)
    for prompt in ("hello", "and now"):
        conversation.answer(prompt)
    told = "the template spells earlier turns otherwise: all turns are read again"
    assert (told in capsys.readouterr().err) == is_read_again
    shown = reader.tokenizer.apply_chat_template(conversation.messages[:3], tokenize=False)
    text = reader.decode(read[document.num_seen - conversation.cache.num_seen :])
    assert text.startswith(shown)
    assert text.count("Once upon") == text.count("Be kind.") == 1
    assert reader.decode(read).endswith(text)
    assert (reader.decode(read) == text) != is_read_again


def test_the_page_s_example_and_commands_follow_each_other_with_one_cache(
    folders, document, monkeypatch, capsys
):
    page = (ROOT / "docs" / "generation.md").read_text()
    example = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(document.parent)
    Path("models").symlink_to(folders[0].parent)
    exec(compile(example, "generation.md", "exec"), {})
    first, second = capsys.readouterr().out.split("In short,")[1:]
    assert first == second
    kept = ("--cache", "book.cache")
    document.write_text("Another text. " + TEXT)
    answers = []
    for options in (kept, ("--document", document, *kept), kept):
        run_chat(monkeypatch, folders, "In short,\n", *options)
        answers.append(capsys.readouterr().out.rstrip("\n"))
    assert first.startswith(answers[0])
    assert answers[0] != answers[1] == answers[2]


@pytest.mark.parametrize("is_kept", [False, True], ids=["reading", "answering"])
def test_ctrl_c_while_reading_or_answering_leaves_nothing_half(
    monkeypatch, folders, document, tmp_path, is_kept
):
    kept, calls = tmp_path / "book.cache", []

    def interrupt(module, args, kwargs) -> None:
        calls.append(kwargs["input_ids"].shape[1])
        if calls[-1] == 1 if is_kept else len(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    def loaded(*args: object) -> tuple:
        model, params = load_retrofit(*args)
        model.base_model.register_forward_pre_hook(interrupt, with_kwargs=True)
        return model, params

    monkeypatch.setattr(conversation, "load_retrofit", loaded)
    options = ("--document", document, "--cache", kept)
    with pytest.raises(SystemExit) as left:
        run_stage(lambda: run_chat(monkeypatch, folders, "The dog\n", *options))
    assert left.value.code == 130
    assert calls[1] > 1
    assert kept.exists() == is_kept
    assert not list(tmp_path.glob("*.partial"))


def refused(monkeypatch, *options: object) -> str:
    monkeypatch.setattr(conversation, "load_retrofit", pytest.fail)
    with pytest.raises(SystemExit) as left:
        run_stage(lambda: chat.main(["models/finetuned", *map(str, options)]))
    return str(left.value.code)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n\n", "{} must hold text, got 3 characters of white space"),
        (b"caf\xe9 au lait", "{} must be text in UTF-8: .* byte 0xe9 in position 3"),
    ],
    ids=str,
)
def test_documents_that_cannot_be_read_are_refused(monkeypatch, tmp_path, content, message):
    path = tmp_path / "x.txt"
    said = refused(monkeypatch, "--document", path)
    assert said == f"error: [Errno 2] No such file or directory: '{path}'"
    path.write_bytes(content)
    assert re.match("error: " + message.format(path), refused(monkeypatch, "--document", path))


def test_what_is_no_cache_is_neither_loaded_nor_replaced(monkeypatch, document):
    missing = document.parent / "x.cache"
    assert refused(monkeypatch, "--cache", missing).startswith(f"error: {missing} is missing: Inf")
    for options in ((), ("--document", document)):
        said = refused(monkeypatch, "--cache", document, *options)
        assert said.startswith(f"error: {document} must be a cache, got something else: ")
    assert document.read_text() == TEXT
    said = refused(monkeypatch, "--document", document, "--cache", document / "x.cache")
    assert said.startswith(f"error: cannot write to {document}: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--document or --cache must be given"),
        (("--cache", "x", "--max-new-tokens", 0), "--max-new-tokens must be at least 1, got 0"),
        (("--cache", "x", "--temperature", "nan"), "--temperature must be at least 0, got nan"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(monkeypatch, capsys, options, message):
    assert refused(monkeypatch, *options) == "2"
    assert message in capsys.readouterr().err
