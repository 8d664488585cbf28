"""Prompts: nothing but the needle tells the answer, and no split has another's."""

from itertools import product

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from tokenizers.processors import TemplateProcessing

from infini_retrofit.texts.prompts import NUM_CANDIDATES, SEEDS_PER_SPLIT, PromptMaker
from infini_retrofit.texts.splits import SPLITS
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer().backend_tokenizer
TEXT = "In 1984 the town had 12,345 inhabitants and a river. Nobody counted the 77 dogs of it. " * 9
HAYSTACKS = ("sentence", "text")


def maker(split: str = "test") -> PromptMaker:
    ids = TOKENIZER.encode(TEXT, add_special_tokens=False).ids
    return PromptMaker(TOKENIZER, [np.array(ids, np.int32)], split)


def text_of(ids: list[int]) -> str:
    return TOKENIZER.decode(list(ids))


@pytest.mark.parametrize("haystack", HAYSTACKS)
def test_a_key_stands_in_its_needle_alone_and_shares_no_token_with_the_haystack(haystack):
    make = maker()
    for seed, depth in product(range(4), (0.0, 0.3, 1.0)):
        prompt = make.passkey(seed, haystack, 500, depth)
        (question,) = prompt.questions
        right = question.candidates[0]
        assert len(prompt.input_ids) + len(question.input_ids) + len(right) == 500
        assert len(set(map(tuple, question.candidates))) == NUM_CANDIDATES
        assert len(set(map(len, question.candidates))) == 1
        key, text = text_of(right).strip(), text_of(prompt.input_ids)
        assert text.count(key) == 2
        needle = f" The pass key is {key}. Remember it. {key} is the pass key."
        haystack_ids = make.encode(text.replace(needle, ""))
        assert not make.has_digit[haystack_ids].any()
        assert len(make.encode(text.partition(needle)[2])) == pytest.approx(prompt.num_since, abs=2)


def test_the_depth_is_the_share_of_the_haystack_before_the_needle():
    since = [maker().passkey(3, "text", 600, depth).num_since for depth in (0.0, 0.25, 0.5, 1.0)]
    assert since[3] == 0
    assert since[1:3] == pytest.approx([0.75 * since[0], 0.5 * since[0]], abs=9)
    at = maker().passkey_at(3, "text", 400)
    (question,) = at.questions
    assert at.num_since + len(question.input_ids) + len(question.candidates[0]) == 400


def test_numbers_are_asked_for_in_other_words_and_against_those_that_are_stored():
    make, num_pairs = maker(), 16
    prompt = make.pairs(5, num_pairs, 4, "text", 1200)
    text = text_of(prompt.input_ids)
    assert len(prompt.questions) == 4
    for question in prompt.questions:
        asked = text_of(question.input_ids)
        name = asked.partition(" belongs to ")[2].partition("?")[0]
        right = text_of(question.candidates[0]).strip()
        assert f" The number of {name} is {right}." in text
        assert f"The number of {name}" not in asked
        assert all(text_of(other).strip() in text for other in question.candidates)
    longest = max(len(q.input_ids) + len(q.candidates[0]) for q in prompt.questions)
    assert len(prompt.input_ids) + longest == 1200


def test_the_seeds_and_the_numbers_of_the_splits_are_disjoint_and_a_seed_repeats_itself():
    makers = {split: maker(split) for split in SPLITS}
    numbers = {
        split: {
            text_of(candidate).strip()
            for seed in range(40)
            for candidate in make.passkey(seed, "sentence", 400, 0.5).questions[0].candidates
        }
        for split, make in makers.items()
    }
    assert all(len(found) > 300 for found in numbers.values())
    assert len(set.union(*numbers.values())) == sum(map(len, numbers.values()))
    assert makers["test"].passkey(7, "text", 400, 0.5) == maker().passkey(7, "text", 400, 0.5)
    with pytest.raises(AssertionError):  # it would be a seed of the next split
        makers["train"].passkey(SEEDS_PER_SPLIT, "text", 400, 0.5)


def test_documents_to_train_on_answer_the_questions_of_their_prompts():
    make, asked = maker("train"), set()
    for seed in range(9):
        document = make.document(seed, 900, "several")
        assert len(document) == 900
        text = text_of(document.tolist())
        intro = "There is an important info hidden"
        for prompt in text.split(intro)[1:]:
            is_key = "What is the pass key?" in prompt
            given, _, answer = prompt.rpartition(" is ")
            assert len(answer.strip()) == 5
            assert given.count(answer.strip()) == (2 if is_key else 1)
            asked.add(is_key)
    assert asked == {True, False}
    one = text_of(make.document(0, 900, "one").tolist())
    assert (one.count(intro), len(make.document(0, 900, "one"))) == (1, 900)


def test_a_prompt_begins_with_what_the_tokenizer_puts_before_a_text():
    tokenizer = tiny_tokenizer().backend_tokenizer
    tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    ids = tokenizer.encode(TEXT).ids
    make = PromptMaker(tokenizer, [np.array(ids, np.int32)] * 2, "test")
    prompt = make.passkey(0, "text", 800, 0.0)
    assert (prompt.input_ids[0], prompt.input_ids.count(0)) == (ids[0], 1)
    assert 0 not in maker().passkey(0, "text", 800, 0.0).input_ids


def test_a_prompt_without_room_for_its_needle_is_refused():
    with pytest.raises(ValueError, match=r"^a prompt needs \d+ tokens more$"):
        maker().passkey(0, "text", 100, 0.5)
    with pytest.raises(ValueError, match=r"^a prompt needs \d+ tokens more$"):
        maker().passkey_at(0, "text", 8)  # the question alone is longer


def sentencepiece() -> Tokenizer:
    """Return a tokenizer that puts a blank before a text, as SentencePiece does (Llama 2)."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    blank = normalizers.Replace(" ", "\u2581")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), blank])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = [*map(chr, range(32, 127)), "\u2581"]
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT.split(), trainer)
    return made


def test_a_tokenizer_that_begins_a_text_with_a_blank_finds_the_key_in_the_prompt():
    tokenizer = sentencepiece()
    ids = np.array(tokenizer.encode(TEXT).ids, np.int32)
    make = PromptMaker(tokenizer, [ids], "test")
    for seed in range(8):
        prompt = make.passkey(seed, "text", 900, 0.5)
        right = prompt.questions[0].candidates[0]
        places = range(len(prompt.input_ids) - len(right))
        found = [i for i in places if prompt.input_ids[i : i + len(right)] == right]
        assert len(found) == 2
    assert make.begins_word.any()
    # At the start of a text it is another token.
    assert tokenizer.encode(" 12345").ids != make.encode(" 12345")
