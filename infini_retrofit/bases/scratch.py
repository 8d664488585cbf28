"""A base made here: a small GPT-NeoX as Pythia, with its own tokenizer.

Both train on the train split of the corpus only. Imports that only training needs stand inside
functions: they take seconds. Knows no path.

Axes:
    B  row of tokens
    T  token of a row
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Int
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from infini_retrofit.bases.folder import BaseModel
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.fields import Batch, Count, EpochsOrZero, LearningRate, Seed
from infini_retrofit.texts.corpora import Corpus

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class ScratchBase:
    """A GPT-NeoX with its own byte-level tokenizer, pretrained on the corpus."""

    num_layers: Annotated[int, Field(gt=0, le=1000)]
    hidden_size: Annotated[int, Field(gt=0, le=65_536)]
    num_heads: Count
    vocab_size: Annotated[int, Field(ge=257, le=2**20)]  # every byte, and the end of a text
    tokens_per_sample: Annotated[int, Field(ge=2, le=2**20)]  # and positions
    samples: Count  # rows, at most
    epochs: EpochsOrZero  # 0: random weights
    batch_size: Batch  # rows per step
    lr: LearningRate  # at its peak
    seed: Seed

    def __post_init__(self) -> None:
        """Refuse heads whose channels cannot be rotated: a quarter of each, in pairs."""
        if self.hidden_size % (unit := 8 * self.num_heads):
            raise ValueError(
                f"hidden_size must be a multiple of {unit} (8 a head), got {self.hidden_size}"
            )

    def known_depth(self) -> int:
        """Return the number of layers."""
        return self.num_layers

    def load(self, corpus_name: str, corpus: Corpus) -> BaseModel:
        """Train tokenizer and model."""
        from infini_retrofit.texts.articles import read_splits

        texts = [article.text for article in read_splits(corpus)["train"]]
        tokenizer = train_tokenizer(texts, self.vocab_size)
        model = self.make_model(tokenizer)
        split = f"on the train split of {corpus_name} ({len(texts)} articles)"
        note = f"random weights; only the tokenizer was trained, {split}"
        if self.epochs:
            rows = pack_rows(tokenizer, texts, self.tokens_per_sample, self.samples)
            self.pretrain(model, rows)
            note = (
                f"trained here from scratch on {self.epochs * rows.numel():,} tokens "
                f"({self.epochs} x {rows.numel():,}) {split}"
            )
        source = f"a GPT-NeoX of {self.num_layers} layers made here, seed {self.seed}"
        return BaseModel(model=model, tokenizer=tokenizer, source=source, note=note)

    def make_model(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
        """Make a GPT-NeoX with random weights and Pythia's other settings."""
        config = GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            intermediate_size=4 * self.hidden_size,
            max_position_embeddings=self.tokens_per_sample,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        torch.manual_seed(self.seed)
        return AutoModelForCausalLM.from_config(config)

    def pretrain(self, model: PreTrainedModel, rows: Int[Tensor, "B T"]) -> None:
        """Train all weights in place; equal arguments give equal weights on one processor."""
        from transformers import Trainer, TrainingArguments

        loss, dataset = NextTokenLoss(model), [{"input_ids": row} for row in rows]
        _, dtype = start_run()
        with tempfile.TemporaryDirectory() as unused:
            arguments = TrainingArguments(  # Pythia's betas, weight decay and cosine to a tenth
                unused,
                per_device_train_batch_size=self.batch_size,
                num_train_epochs=self.epochs,
                learning_rate=self.lr,
                lr_scheduler_type="cosine_warmup_with_min_lr",
                lr_scheduler_kwargs={"min_lr_rate": 0.1},
                warmup_steps=0.05,  # of all steps
                weight_decay=0.1,
                adam_beta2=0.95,
                seed=self.seed,
                bf16=dtype is torch.bfloat16,
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=torch.cuda.is_available(),
                logging_strategy="epoch",
                save_strategy="no",
                report_to="none",
            )
            arguments._n_gpu = min(1, arguments.n_gpu)  # or a step takes batch_size rows per GPU
            trainer = Trainer(loss, arguments, train_dataset=dataset)
            try:
                trainer.train()
                model.cpu().eval()
                with torch.no_grad():  # the last step may have broken the weights
                    loss(rows[: self.batch_size])
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"pretraining diverged after step {trainer.state.global_step}: {error}; "
                    "nothing was written, try a smaller models.*.lr"
                ) from error


class NextTokenLoss(nn.Module):
    """A language model that returns its loss alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """Return the mean loss of all tokens but each row's first, in nats."""
        # The model compares each position with the next label: the only shift.
        loss = self.model(input_ids, labels=input_ids, use_cache=False).loss
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()}")
        return {"loss": loss}


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which encodes every text without loss."""
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
            f"models.*.vocab_size must be at most {found} for this corpus, got {vocab_size}"
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
    """Join the texts, each with its end, and cut them into whole rows."""
    stream: list[int] = []
    for text in texts:
        if len(stream) < samples * tokens_per_sample:
            stream += [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    num_rows = min(samples, len(stream) // tokens_per_sample)
    if not num_rows:
        raise ValueError(
            "models.*.tokens_per_sample must be at most the train split of the corpus, "
            f"{len(stream)} tokens, got {tokens_per_sample}"
        )
    return torch.tensor(stream[: num_rows * tokens_per_sample]).view(num_rows, tokens_per_sample)
