"""The tokenizer of a base made here keeps every text; its rows are texts one after another."""

import pytest
from tokenizers import Tokenizer, normalizers

from infini_retrofit.bases.scratch import ScratchBase, pack_rows, train_articles, train_tokenizer
from infini_retrofit.bases.sources import bring_base
from infini_retrofit.model.base import load_tokenizer
from tests.tiny_scratch import SIZES, WORDS, write_corpus

# Combining accents, half a family, spaces, control characters, and the end of a text in words.
HARD_TEXTS = [
    "e\u0301 \u00e9 \ufb01 \U0001f469\u200d",
    " two  spaces \t\r\n\n .",
    "\x00\x7f\u2028",
    "<|endoftext|> said he , don 't !",
    "",
]


def assert_keeps_every_text(tokenizer):
    for text in HARD_TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_tokenizer_keeps_every_text_through_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = write_corpus()
    tokenizer = train_tokenizer([a.text for a in train_articles(corpus)], SIZES["vocab_size"])
    assert len(tokenizer) == SIZES["vocab_size"]
    assert_keeps_every_text(tokenizer)
    bring_base(ScratchBase(**SIZES | {"epochs": 0}), "mini", tmp_path / "base", "mine", corpus)
    loaded = load_tokenizer(tmp_path / "base")
    assert_keeps_every_text(loaded)
    plain = Tokenizer.from_file(str(tmp_path / "base/tokenizer.json"))
    for text in [*HARD_TEXTS, *WORDS]:
        want = tokenizer.encode(text, add_special_tokens=False)
        assert loaded.encode(text) == plain.encode(text).ids == want
    assert len(loaded.encode(" river")) < len(" river")


def test_a_tokenizer_that_composes_characters_is_noticed():
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 260)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(AssertionError):
        assert_keeps_every_text(tokenizer)


def test_rows_are_the_texts_one_after_another_each_with_its_end():
    texts = ["the old bridge", "water", "the sea and the river"] * 4
    tokenizer = train_tokenizer(texts, 270)
    rows = pack_rows(tokenizer, texts, 7, 1000)
    stream = "<|endoftext|>".join(texts) + "<|endoftext|>"
    ids = tokenizer.encode(stream)
    assert rows.flatten().tolist() == ids[: len(ids) // 7 * 7]
    assert len(ids) % 7
    assert pack_rows(tokenizer, texts, 7, 2).tolist() == rows[:2].tolist()
