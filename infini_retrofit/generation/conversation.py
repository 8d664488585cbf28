"""Read a document into a model's memory, and answer prompts from it.

Knows nothing of how models remember, and of files.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from infini_retrofit.generation.cache import InfiniCache
from infini_retrofit.generation.generation import read


@dataclass(frozen=True)
class Reader:
    """A model with its tokenizer, and how it is to answer.

    Attributes:
        model: that generates with an `InfiniCache`.
        tokenizer: the model's.
        max_new_tokens: of an answer, at most.
        temperature: of sampling; 0: the likeliest token.
        uses_template: put each prompt into the tokenizer's chat template.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    temperature: float
    uses_template: bool

    def read(self, text: str) -> InfiniCache:
        """Read a document, with a progress bar."""
        ids = torch.tensor([self._encode(text)])
        cache = InfiniCache(self.model)
        with tqdm(total=ids.shape[1], unit=" tokens", desc="reading") as bar:
            for num_tokens in read(self.model, ids, cache):
                bar.set_postfix_str(size_of(cache), refresh=False)
                bar.update(num_tokens)
        return cache

    def answer(self, prompt: str, cache: InfiniCache, last: list[int]) -> list[int]:
        """Print an answer token by token.

        Args:
            prompt: what is asked.
            cache: what was read; goes on with the prompt and the answer.
            last: the token that an earlier answer ended with, which no cache has seen yet; or none.

        Returns:
            The token that this answer ended with.
        """
        if self.uses_template:
            prompt = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        ids = torch.tensor([last + self._encode(prompt)], device=self.model.device)
        sampling = {"temperature": self.temperature} if self.temperature else {}
        found = self.model.generate(
            ids,
            attention_mask=cache.mask_for(ids),
            past_key_values=cache,
            max_new_tokens=self.max_new_tokens,
            do_sample=bool(sampling),
            pad_token_id=self.tokenizer.eos_token_id,
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
        return found[0, -1:].tolist()

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def converse(reader: Reader, cache: InfiniCache, prompts: Iterable[str], goes_on: bool) -> None:
    """Answer prompts.

    Args:
        reader: answers.
        cache: the document, as read.
        prompts: one after another.
        goes_on: each prompt comes after the answer before it, not right after the document.
    """
    last: list[int] = []
    for prompt in prompts:
        if goes_on:
            last = reader.answer(prompt, cache, last)
        else:
            reader.answer(prompt, copy.deepcopy(cache), [])


def size_of(cache: InfiniCache) -> str:
    """Say what a cache takes, and whether that grows."""
    grows = "" if cache.is_bounded else " and growing (other_layers: full)"
    return f"{cache.num_bytes / 2**10:,.0f} KiB{grows}"
