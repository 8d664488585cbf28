"""A conversation with a model that has read a document.

`chat` parses the command line without torch, and calls this. Knows nothing of how models remember.
"""

import copy
import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from infini_retrofit.generation.cache import InfiniCache, check_file
from infini_retrofit.generation.generation import enable_generation, read
from infini_retrofit.generation.versions import CACHE
from infini_retrofit.model.base import load_tokenizer
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.files import check_writable


def chat(options: Namespace, text: str | None, prompts: Iterable[str]) -> None:
    """Read a document, or load what was read, then answer prompts.

    Without a `text`, the file `options.cache` holds what was read.
    """
    # Before a model is loaded. What is no cache is neither loaded nor replaced.
    if text is None or (options.cache is not None and options.cache.exists()):
        check_file(options.cache)
    if text is not None and options.cache is not None:
        check_writable(options.cache.parent)
    device, dtype = start_run()
    model, params = load_retrofit(options.base, options.model, dtype)
    enable_generation(model.to(device), params, options.other_layers)
    reader = Reader(model, load_tokenizer(options.base), options)
    cache = InfiniCache.load(options.cache, model) if text is None else reader.read(text)
    if text is not None and options.cache is not None:
        cache.save(options.cache, model)
    print(f"{cache.num_seen:,} tokens read, {size_of(cache)} kept", file=sys.stderr)
    last: list[int] = []
    for prompt in prompts:
        if options.goes_on:
            last = reader.answer(prompt, cache, last)
        else:
            reader.answer(prompt, copy.deepcopy(cache), [])


@dataclass(frozen=True)
class Reader:
    """A model that generates with an `InfiniCache`, its tokenizer, and the options of `chat`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: Namespace

    def read(self, text: str) -> InfiniCache:
        """Read a document, with a progress bar."""
        ids = torch.tensor([self.encode(text)])
        cache = InfiniCache(self.model)
        with tqdm(total=ids.shape[1], unit=" tokens", desc="reading") as bar:
            for num_tokens in read(self.model, ids, cache):
                bar.set_postfix_str(size_of(cache), refresh=False)
                bar.update(num_tokens)
        return cache

    def answer(self, prompt: str, cache: InfiniCache, last: list[int]) -> list[int]:
        """Print an answer token by token, and add prompt and answer to the cache.

        `last` holds the token that ended the answer before, which no cache has seen, or nothing.
        The result is the token that ended this answer.
        """
        if self.options.template:
            prompt = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        ids = torch.tensor([last + self.encode(prompt)], device=self.model.device)
        temperature = self.options.temperature
        found = self.model.generate(
            ids,
            attention_mask=cache.mask_for(ids),
            max_new_tokens=self.options.max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,  # without sampling transformers warns of a value
            pad_token_id=self.tokenizer.eos_token_id,
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **{CACHE: cache},
        )
        return found[0, -1:].tolist()

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def size_of(cache: InfiniCache) -> str:
    """Return the size of a cache in words, and whether it grows."""
    grows = "" if cache.is_bounded else " and growing (other_layers: full)"
    return f"{cache.num_bytes / 2**10:,.0f} KiB{grows}"
