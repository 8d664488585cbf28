"""Prompts that ask for what stood far back: a pass key, or numbers that names belong to.

Nothing but the answers must tell them: digits stand in needles only. A seed gives the same prompt
again; the seeds, keys and texts of training and of test are disjoint. Knows no model.

Source: Mohtashami & Jaggi 2023, arXiv:2305.16300 (pass key, as in arXiv:2404.07143, section 4.1).

Differs from the paper: numbers are asked for in other words than they are given, and the
haystack may be text that does not repeat itself.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from infini_retrofit.pipeline.beginnings import first_tokens
from infini_retrofit.pipeline.tables import TokenIds
from infini_retrofit.texts.splits import SPLITS

Haystack = Literal["sentence", "text"]  # the paper's, again and again; text of the split
PromptsPerDocument = Literal["one", "several"]  # of a document to train on
SEEDS_PER_SPLIT = 10**8
_BEFORE = "a"  # stands before what is encoded apart, and is no part of it
_SENTENCEPIECE_SPACE = "\u2581"
_TRIED_NUMBERS = 1000  # to see how many tokens most have
NUM_CANDIDATES = 10  # the right answer, and others that stand nowhere in the prompt or elsewhere
_INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
_SENTENCE = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
_KEY = " The pass key is {0}. Remember it. {0} is the pass key."
_KEY_QUESTION = " What is the pass key? The pass key is"
_PAIR = " The number of {name} is {number}."
_PAIR_QUESTION = " Which number belongs to {name}? The number that belongs to {name} is"
# fmt: off
_NAMES = [
    "Adam", "Alice", "Amy", "Anna", "Arthur", "Ben", "Carl", "Carol", "Charles", "Clara",
    "Daniel", "David", "Diana", "Edward", "Ellen", "Emily", "Emma", "Eric", "Frank", "Fred",
    "George", "Grace", "Hannah", "Harry", "Helen", "Henry", "Irene", "Jack", "Jacob", "James",
    "Jane", "Jason", "Jean", "John", "Joseph", "Julia", "Karen", "Kate", "Kevin", "Laura",
    "Linda", "Louis", "Lucy", "Maria", "Mark", "Martin", "Mary", "Matthew", "Michael", "Nancy",
    "Nick", "Nora", "Oliver", "Oscar", "Patrick", "Paul", "Peter", "Rachel", "Robert", "Rose",
    "Ruth", "Sam", "Sarah", "Simon", "Sophie", "Stephen", "Susan", "Thomas", "Tom", "Victor",
    "Walter", "William",
]
# fmt: on
MOST_PAIRS = 64


@dataclass(frozen=True)
class Question:
    """What is asked, and answers of equal length, the right one first."""

    input_ids: list[int]
    candidates: list[list[int]]


@dataclass(frozen=True)
class Prompt:
    """A text, and questions about it.

    Attributes:
        num_since: tokens behind the first needle's last token, in `input_ids`.
    """

    input_ids: list[int]
    questions: list[Question]
    num_since: int = 0


class PromptMaker:
    """Makes the prompts of one split.

    Args:
        tokenizer: of the base.
        texts: token ids of the split's articles, for the haystack that does not repeat itself.
        split: its seeds and numbers are no other split's.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[TokenIds], split: str) -> None:
        self.tokenizer, self.split = tokenizer, SPLITS.index(split)
        vocabulary = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]
        self.has_digit = np.array([any(c.isdigit() for c in word) for word in vocabulary])
        names = (tokenizer.id_to_token(i) for i in range(len(vocabulary)))
        self.begins_word = np.array(
            [
                word[:1].isspace() or name.startswith(_SENTENCEPIECE_SPACE)
                for word, name in zip(vocabulary, names, strict=True)
            ]
        )
        first = first_tokens(tokenizer)
        self.intro = [*first, *tokenizer.encode(_INTRO, add_special_tokens=False).ids]
        joined = np.concatenate([ids[len(first) :] for ids in texts])
        self.text = joined[~self.has_digit[joined]]
        self.sentence = np.array(self.encode(_SENTENCE))
        rng = random.Random(0)
        lengths = [len(self.encode(f" {self._number(rng)}")) for _ in range(_TRIED_NUMBERS)]
        self.tokens_per_number = max(set(lengths), key=lengths.count)
        pair, question = (x.format(name=_NAMES[0], number="") for x in (_PAIR, _PAIR_QUESTION))
        words = len(self.encode(pair)) + len(self.encode(question))
        # In a document to train on, half of which is haystack.
        self.tokens_per_pair = 2 * (words + 2 * self.tokens_per_number)
        needle, question = self.encode(_KEY.format("")), self.encode(_KEY_QUESTION)
        words = len(self.intro) + len(needle) + len(question)
        self.least_tokens = words + 4 * self.tokens_per_number  # of a prompt
        if self.has_digit[self.sentence].any() or not len(self.text):
            raise ValueError("the texts of each split must have tokens without digits, got none")

    def passkey(self, seed: int, haystack: Haystack, num_tokens: int, depth: float) -> Prompt:
        """Make a prompt that is `num_tokens` long with question and answer.

        `depth` is the share of the haystack before the needle: 0 puts it first, 1 last.
        """
        return self._passkey(seed, haystack, num_tokens, depth=depth)

    def passkey_at(self, seed: int, haystack: Haystack, num_since: int) -> Prompt:
        """Make a prompt with `num_since` tokens between the needle and the question's answer."""
        return self._passkey(seed, haystack, None, num_since=num_since)

    def _passkey(
        self,
        seed: int,
        haystack: Haystack,
        num_tokens: int | None,
        depth: float = 0.0,
        num_since: int = 0,
    ) -> Prompt:
        rng = self._rng(seed)
        candidates = self._numbers(rng, NUM_CANDIDATES)
        key = self.tokenizer.decode(candidates[0]).strip()
        intro, needle = self.intro, self.encode(_KEY.format(key))
        question = self.encode(_KEY_QUESTION)
        num_asked = len(question) + len(candidates[0])
        if num_tokens is None:
            before, after = 0, num_since - num_asked
        else:
            room = num_tokens - len(intro) - len(needle) - num_asked
            before = round(depth * room)
            after = room - before
        filler = self._filler(rng, haystack, before + after)
        before = self._place(filler, before)
        ids = [*intro, *filler[:before], *needle, *filler[before:]]
        return Prompt(ids, [Question(question, candidates)], len(filler) - before)

    def pairs(
        self,
        seed: int,
        num_pairs: int,
        most_questions: int,
        haystack: Haystack | None = None,
        num_tokens: int = 0,
        *,
        asks_all: bool = False,
    ) -> Prompt:
        """Make a prompt of names and their numbers; some of them are asked for, in other words.

        With a haystack the pairs stand spread in it, at equal distances, and the prompt is
        `num_tokens` long with the longest question and answer; `asks_all`: with all of them.
        """
        rng = self._rng(seed)
        names = rng.sample(_NAMES, num_pairs)
        numbers = self._numbers(rng, max(num_pairs, NUM_CANDIDATES))
        pairs = [
            self.encode(_PAIR.format(name=name, number=self.tokenizer.decode(ids).strip()))
            for name, ids in zip(names, numbers, strict=False)
        ]
        questions = []
        for index in rng.sample(range(num_pairs), min(num_pairs, most_questions)):
            others = [number for i, number in enumerate(numbers) if i != index]
            # Stored numbers first: with ten or more, to know which were stored does not help.
            stored, strange = others[: num_pairs - 1], others[num_pairs - 1 :]
            wrong = rng.sample(stored, min(len(stored), NUM_CANDIDATES - 1)) + strange
            ids = self.encode(_PAIR_QUESTION.format(name=names[index]))
            questions.append(Question(ids, [numbers[index], *wrong[: NUM_CANDIDATES - 1]]))
        asked = [len(q.input_ids) + len(q.candidates[0]) for q in questions]
        ids = list(self.intro)
        rest = len(ids) + sum(map(len, pairs)) + (sum(asked) if asks_all else max(asked))
        filler = self._filler(rng, haystack, num_tokens - rest) if haystack else []
        equal = (len(filler) * (i + 1) // (num_pairs + 1) for i in range(num_pairs))
        ends = [self._place(filler, place) for place in equal]
        for begin, end, pair in zip([0, *ends], ends, pairs, strict=False):
            ids += [*filler[begin:end], *pair]
        return Prompt(ids + filler[ends[-1] :], questions)

    def document(self, seed: int, num_tokens: int, number: PromptsPerDocument) -> TokenIds:
        """Make a document to train on: prompts and their answers, exactly `num_tokens` long.

        A prompt hides a pass key, or numbers of names. The lengths of several are random, short
        ones as frequent as long ones; what an earlier one hid must be told from what a later one
        hides.
        """
        rng, ids = self._rng(seed), []
        while number == "several" and (left := num_tokens - len(ids)) >= 2 * self.least_tokens:
            longest = (left - self.least_tokens) / self.least_tokens
            ids += self._answered(rng, round(self.least_tokens * longest ** rng.random()))
        return np.array(ids + self._answered(rng, num_tokens - len(ids)), np.int32)

    def _answered(self, rng: random.Random, num_tokens: int) -> list[int]:
        """Return a prompt with all of its questions and answers."""
        seed, haystack = rng.randrange(SEEDS_PER_SPLIT), rng.choice(["sentence", "text"])
        if rng.random() < 0.5:
            prompt = self.passkey(seed, haystack, num_tokens, rng.random())
        else:
            number = rng.randint(1, max(1, min(MOST_PAIRS, num_tokens // self.tokens_per_pair)))
            prompt = self.pairs(seed, number, number, haystack, num_tokens, asks_all=True)
        ids = list(prompt.input_ids)
        for question in prompt.questions:
            ids += [*question.input_ids, *question.candidates[0]]
        return ids

    def encode(self, text: str) -> list[int]:
        """Encode what stands inside a text: SentencePiece puts a blank before a text's start."""
        before, whole = (
            self.tokenizer.encode(x, add_special_tokens=False).ids
            for x in (_BEFORE, _BEFORE + text)
        )
        if whole[: len(before)] != before:
            raise ValueError(
                "the base's tokenizer must cut text at blanks, or prompts cannot be put together, "
                f"but it joins {_BEFORE!r} to {text[:20]!r}"
            )
        return whole[len(before) :]

    def _rng(self, seed: int) -> random.Random:
        assert 0 <= seed < SEEDS_PER_SPLIT
        return random.Random(self.split * SEEDS_PER_SPLIT + seed)

    def _numbers(self, rng: random.Random, count: int) -> list[list[int]]:
        """Draw different numbers, each of the tokens that most numbers have."""
        found: dict[int, list[int]] = {}
        while len(found) < count:
            number = self._number(rng)
            ids = self.encode(f" {number}")
            if len(ids) == self.tokens_per_number:
                found[number] = ids
        return list(found.values())

    def _number(self, rng: random.Random) -> int:
        """Draw a number of five digits that no other split has."""
        least, most = 10_000 // len(SPLITS) + 1, 100_000 // len(SPLITS)
        return len(SPLITS) * rng.randrange(least, most) + self.split

    def _place(self, filler: Sequence[int], place: int) -> int:
        """Return the next place where a word begins, or the place itself if none does."""
        places = range(place, len(filler)) if place else ()
        return next((i for i in places if self.begins_word[filler[i]]), place)

    def _filler(self, rng: random.Random, haystack: Haystack, num_tokens: int) -> list[int]:
        """Return so many tokens without digits."""
        if num_tokens < 0:
            raise ValueError(f"a prompt needs {-num_tokens} tokens more")
        source = self.sentence if haystack == "sentence" else self.text
        begin = 0 if haystack == "sentence" else rng.randrange(len(source))
        places = (begin + np.arange(num_tokens)) % len(source)
        return source[places].tolist()
