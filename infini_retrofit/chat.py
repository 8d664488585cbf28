"""Read a document into a model's memory, then answer prompts from standard input.

`python -m infini_retrofit.chat models/finetuned --document book.txt`. Each prompt is text that the
model goes on from, right after the document; it starts from the document's memory, not from the
answer before it, unless `--continue` is given. Knows nothing of how models remember.
"""

import argparse
import copy
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from infini_retrofit.base import load_tokenizer
from infini_retrofit.cache import InfiniCache
from infini_retrofit.cache_file import check_file, check_place
from infini_retrofit.checkpoints import load_retrofit
from infini_retrofit.generation import enable_generation, read
from infini_retrofit.pipeline import run_stage
from infini_retrofit.runtime import start_run

BASE = Path("models/base")


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
        ids = self._encode(text)
        cache = InfiniCache(self.model)
        with tqdm(total=ids.shape[1], unit=" tokens", desc="reading") as bar:
            for num_tokens in read(self.model, ids, cache):
                bar.set_postfix_str(_size(cache), refresh=False)
                bar.update(num_tokens)
        return cache

    def answer(self, prompt: str, cache: InfiniCache, last: torch.Tensor) -> torch.Tensor:
        """Print an answer token by token.

        Args:
            prompt: what is asked.
            cache: what was read; goes on with the prompt and the answer.
            last: the token that an earlier answer ended with, (1 1), which no cache has seen yet;
                or none, (1 0).

        Returns:
            The token that this answer ended with.
        """
        if self.uses_template:
            prompt = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        ids = torch.cat([last, self._encode(prompt)], dim=1).to(self.model.device)
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
        return found[:, -1:].cpu()

    def _encode(self, text: str) -> torch.Tensor:
        found = self.tokenizer(text, add_special_tokens=False, verbose=False, return_tensors="pt")
        return found["input_ids"]


def main() -> None:
    """Read, then answer until the input ends."""
    options = _options()
    text = None if options.document is None else read_text(options.document)
    if text is None:
        check_file(options.cache)
    elif options.cache is not None:
        if options.cache.exists():
            raise FileExistsError(
                f"{options.cache} exists: leave --document out to go on from it, or remove it"
            )
        check_place(options.cache)
    device, dtype = start_run()
    model, params = load_retrofit(options.base, options.model, dtype)
    enable_generation(model.to(device), params, options.other_layers)
    tokenizer = load_tokenizer(options.base)
    sampling = (options.max_new_tokens, options.temperature, options.template)
    reader = Reader(model, tokenizer, *sampling)
    if text is None:
        cache = InfiniCache.load(options.cache, model)
    else:
        cache = reader.read(text)
        if options.cache is not None:
            cache.save(options.cache, model)
    print(f"{cache.num_seen:,} tokens read, {_size(cache)} kept", file=sys.stderr)
    converse(reader, cache, _prompts(), options.goes_on)


def converse(reader: Reader, cache: InfiniCache, prompts: Iterable[str], goes_on: bool) -> None:
    """Answer prompts.

    Args:
        reader: answers.
        cache: the document, as read.
        prompts: one after another.
        goes_on: each prompt comes after the answer before it, not right after the document.
    """
    none = last = torch.zeros(1, 0, dtype=torch.long)
    for prompt in prompts:
        if goes_on:
            last = reader.answer(prompt, cache, last)
        else:
            reader.answer(prompt, copy.deepcopy(cache), none)


def read_text(path: Path) -> str:
    """Read a document.

    Raises:
        FileNotFoundError: if there is no such file.
        IsADirectoryError: if it is a folder.
        ValueError: if it holds no text, or none in UTF-8.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: --document must name a text file")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: --document must name a text file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{path} must be text in UTF-8, got byte 0x{byte:02x} at position {error.start}"
        ) from error
    if not text.strip():
        raise ValueError(f"{path} must hold text, got {len(text)} characters of white space")
    return text


def _prompts() -> Iterable[str]:
    """Yield the lines of standard input that are not empty."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _size(cache: InfiniCache) -> str:
    grows = "" if cache.is_bounded else " and growing (other_layers: full)"
    return f"{cache.num_bytes / 2**10:,.0f} KiB{grows}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infini_retrofit.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, help="folder of a retrofitted model, like models/finetuned")
    add("--base", type=Path, default=BASE, help="folder of its base (default: %(default)s)")
    add("--document", type=Path, help="a text in UTF-8 to read")
    add("--cache", type=Path, help="where to save what was read, or to load it from")
    add("--continue", dest="goes_on", action="store_true", help="prompts follow the last answer")
    add("--template", action="store_true", help="put prompts into the tokenizer's chat template")
    add("--other-layers", choices=["segment", "full"], help="default: as the model says")
    add("--max-new-tokens", type=int, default=200, help="of an answer (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 (default): the likeliest token")
    options = parser.parse_args()
    if options.document is None and options.cache is None:
        parser.error("--document or --cache must be given: there is nothing to read")
    if options.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if not 0 <= options.temperature < float("inf"):
        parser.error(f"--temperature must be at least 0, got {options.temperature}")
    return options


if __name__ == "__main__":
    run_stage(main)
