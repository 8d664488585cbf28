"""A base model made here: a small GPT-NeoX, as Pythia is one, and a tokenizer of its own.

Both learn from the train split of the corpus and see no other article. Knows no path. What is
imported late is slow to import, and the other sources of a base need none of it.

Axes:
    B  row of tokens
    T  token of a row
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from infini_retrofit.bases.folder import BaseModel
from infini_retrofit.texts.corpora import CorpusShares
from infini_retrofit.texts.splits import Article, split_articles

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte, and the end of a text
# As in Pythia: a quarter of each head's channels is rotated, in pairs.
ROTATED_SHARE, ROPE_THETA = 0.25, 10000.0
_HEAD_DIM_UNIT = 8
_LEAST = {
    "num_layers": 1,
    "hidden_size": 1,
    "num_heads": 1,
    "tokens_per_sample": 2,
    "samples": 1,
    "epochs": 0,
    "batch_size": 1,
    "seed": 0,
}


@dataclass(frozen=True, kw_only=True)
class ScratchBase:
    """A GPT-NeoX with its own byte-level tokenizer, pretrained on the corpus."""

    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int
    tokens_per_sample: int  # in a row of training, and the model's number of positions
    samples: int  # rows, at most
    epochs: int  # 0: random weights
    batch_size: int  # rows a step
    lr: float  # at its peak
    seed: int

    def __post_init__(self) -> None:
        """Refuse sizes that make no model, before the corpus is read."""
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"models.*.{name} must be at least {least}, got {value}")
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"models.*.vocab_size must be at least {SMALLEST_VOCABULARY} (256 bytes and the "
                f"end of a text), got {self.vocab_size}"
            )
        if self.hidden_size % (unit := _HEAD_DIM_UNIT * self.num_heads):
            raise ValueError(
                f"models.*.hidden_size must be a multiple of {unit} ({_HEAD_DIM_UNIT} for each of "
                f"num_heads, a quarter of which is rotated in pairs), got {self.hidden_size}"
            )
        if self.seed >= 2**32:
            raise ValueError(f"models.*.seed must be below 2**32, got {self.seed}")
        if self.lr <= 0:
            raise ValueError(f"models.*.lr must be greater than 0, got {self.lr}")

    def known_depth(self) -> int:
        """Count its layers."""
        return self.num_layers

    def load(self, corpus_name: str, corpus: CorpusShares) -> BaseModel:
        """Train tokenizer and model.

        Raises:
            ValueError: if the corpus is too small for the vocabulary or for one row.
            FloatingPointError: if training diverges.
        """
        texts = [article.text for article in train_articles(corpus)]
        tokenizer = train_tokenizer(texts, self.vocab_size)
        about = f"on the train split of {corpus_name} ({len(texts)} articles)"
        note = f"random weights; only the tokenizer was trained, {about}"
        if self.epochs:
            rows = pack_rows(tokenizer, texts, self.tokens_per_sample, self.samples)
            note = (
                f"trained here from scratch on {self.epochs * rows.numel():,} tokens "
                f"({self.epochs} x {rows.numel():,}) {about}"
            )
        model = self.make_model(tokenizer)
        if self.epochs:
            self.pretrain(model, rows)
        return BaseModel(
            model=model,
            tokenizer=tokenizer,
            source=f"a GPT-NeoX of {self.num_layers} layers made here, seed {self.seed}",
            note=note,
        )

    def make_model(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
        """Make a GPT-NeoX of these sizes with random weights, everything else as Pythia."""
        config = GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            intermediate_size=4 * self.hidden_size,
            max_position_embeddings=self.tokens_per_sample,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": ROPE_THETA,
                "partial_rotary_factor": ROTATED_SHARE,
            },
            use_parallel_residual=True,
            attention_bias=True,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        torch.manual_seed(self.seed)
        return AutoModelForCausalLM.from_config(config)

    def pretrain(self, model: PreTrainedModel, rows: Int[Tensor, "B T"]) -> None:
        """Train the model in place."""
        from infini_retrofit.bases.pretraining import pretrain

        schedule = {"epochs": self.epochs, "batch_size": self.batch_size, "lr": self.lr}
        pretrain(model, rows, **schedule, seed=self.seed)


def train_articles(corpus: CorpusShares) -> list[Article]:
    """Read the articles that the pipeline trains on, split from the others as it does."""
    from infini_retrofit.texts.articles import read_corpus

    return split_articles(read_corpus(corpus), corpus.val_share, corpus.test_share)["train"]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, to which no text is unknown and none is changed.

    Raises:
        ValueError: if the texts do not hold so many pairs to merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise ValueError(
            f"models.*.vocab_size must be at most {found} for the train split of this corpus, "
            f"got {vocab_size}"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def pack_rows(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], tokens_per_sample: int, samples: int
) -> Int[Tensor, "B T"]:
    """Cut the texts, one after another and each with its end, into rows; the tail is dropped.

    Raises:
        ValueError: if the texts do not fill one row.
    """
    stream: list[int] = []
    for text in texts:
        if len(stream) >= samples * tokens_per_sample:
            break
        stream += [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    num_rows = min(samples, len(stream) // tokens_per_sample)
    if not num_rows:
        raise ValueError(
            "models.*.tokens_per_sample must be at most the train split of the corpus, "
            f"{len(stream)} tokens, got {tokens_per_sample}"
        )
    return torch.tensor(stream[: num_rows * tokens_per_sample]).view(num_rows, tokens_per_sample)
