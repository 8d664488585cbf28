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
from infini_retrofit.pipeline.beginnings import first_tokens
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
    tokenizer = load_tokenizer(options.base)
    if options.template and tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {options.base} must have a chat template, got none: leave out "
            "--template"
        )
    device, dtype = start_run()
    model, params = load_retrofit(options.base, options.model, dtype)
    enable_generation(model.to(device), params, options.other_layers)
    reader = Reader(model, tokenizer, options)
    cache = InfiniCache.load(options.cache, model) if text is None else reader.read(text)
    if text is not None and options.cache is not None:
        cache.save(options.cache, model)
    print(f"{cache.num_seen:,} tokens read, {size_of(cache)} kept", file=sys.stderr)
    conversation = Conversation(reader, cache)
    for prompt in prompts:
        if not options.goes_on:
            conversation = Conversation(reader, cache)
        conversation.answer(prompt)


@dataclass(frozen=True)
class Reader:
    """A model that generates with an `InfiniCache`, its tokenizer, and the options of `chat`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: Namespace

    @property
    def first(self) -> list[int]:
        """The tokens before every text: BOS, or none."""
        return first_tokens(self.tokenizer.backend_tokenizer)

    def read(self, text: str) -> InfiniCache:
        """Read a document, with a progress bar."""
        ids = torch.tensor([self.first + self.encode(text)])
        cache = InfiniCache(self.model)
        with tqdm(total=ids.shape[1], unit=" tokens", desc="reading") as bar:
            for num_tokens in read(self.model, ids, cache):
                bar.set_postfix_str(size_of(cache), refresh=False)
                bar.update(num_tokens)
        return cache

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        """Return the text of tokens, as a template or the same tokenizer would spell it."""
        options = {"clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens, **options)


class Conversation:
    """Prompts and answers after a document, of which each token is read once.

    With a chat template each turn reads what the template of the whole conversation has more than
    was read before it: BOS and a system prompt come once, and what follows an answer comes too.
    """

    def __init__(self, reader: Reader, document: InfiniCache) -> None:
        self.reader, self.document = reader, document
        self.messages: list[dict[str, str]] = []
        self._begin()

    def _begin(self) -> None:
        """Go back to the document."""
        self.cache = copy.deepcopy(self.document)
        # No cache has seen the token that ended the last answer. With and without it: that token,
        # and the text of what was read after the document.
        self.seen: list[tuple[list[int], str]] = [([], "")]

    def answer(self, prompt: str) -> None:
        """Print an answer token by token."""
        reader, temperature = self.reader, self.reader.options.temperature
        (last, seen), text = self.seen[0], prompt
        if reader.options.template:
            last, seen, text = self._next(prompt)
        ids = torch.tensor([last + reader.encode(text)], device=reader.model.device)
        found = reader.model.generate(
            ids,
            attention_mask=self.cache.mask_for(ids),
            max_new_tokens=reader.options.max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,  # without sampling transformers warns of a value
            pad_token_id=reader.tokenizer.eos_token_id,
            streamer=TextStreamer(reader.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **{CACHE: self.cache},
        )
        answer = found[0, ids.shape[1] :].tolist()
        with_last, without = (seen + text + reader.decode(x) for x in (answer, answer[:-1]))
        self.seen = [(answer[-1:], with_last), ([], without)]
        said = reader.decode(answer, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": said})

    def _next(self, prompt: str) -> tuple[list[int], str, str]:
        """Return what was read, and what the template with a new prompt has more than that."""
        self.messages.append({"role": "user", "content": prompt})
        whole = self.reader.tokenizer.apply_chat_template(
            self.messages, tokenize=False, add_generation_prompt=True
        )
        if first := self.reader.first:  # the document has read BOS
            whole = whole.removeprefix(self.reader.decode(first))
        for last, seen in self.seen:
            if whole.startswith(seen):
                return last, seen, whole.removeprefix(seen)
        told = "note: the template spells earlier turns otherwise: all turns are read again"
        print(told, file=sys.stderr)
        self._begin()
        return [], "", whole


def size_of(cache: InfiniCache) -> str:
    """Return the size of a cache in words, and whether it grows."""
    grows = "" if cache.is_bounded else " and growing (other_layers: full)"
    return f"{cache.num_bytes / 2**10:,.0f} KiB{grows}"
