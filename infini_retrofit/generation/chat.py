"""Read a document into a model's memory, then answer prompts from standard input.

`python -m infini_retrofit.generation.chat models/finetuned --document book.txt`. Each prompt is
text that the model goes on from, right after the document; it starts from the document's memory,
not from the answer before it, unless `--continue` is given. Knows nothing of how models remember.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from infini_retrofit.pipeline.guard import run_stage

BASE = Path("models/base")


def main(arguments: list[str] | None = None) -> None:
    """Read, then answer until the input ends."""
    options = _options(arguments)
    text = None if options.document is None else read_text(options.document)
    # These import torch, which takes seconds: what is wrong with the arguments was said before.
    from infini_retrofit.generation.cache import InfiniCache
    from infini_retrofit.generation.cache_file import check_file, check_place
    from infini_retrofit.generation.conversation import Reader, converse, size_of
    from infini_retrofit.generation.generation import enable_generation
    from infini_retrofit.model.base import load_tokenizer
    from infini_retrofit.model.checkpoints import load_retrofit
    from infini_retrofit.pipeline.device import start_run

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
    print(f"{cache.num_seen:,} tokens read, {size_of(cache)} kept", file=sys.stderr)
    converse(reader, cache, _prompts(), options.goes_on)


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


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infini_retrofit.generation.chat",
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
    options = parser.parse_args(arguments)
    if options.document is None and options.cache is None:
        parser.error("--document or --cache must be given: there is nothing to read")
    if options.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if not 0 <= options.temperature < float("inf"):
        parser.error(f"--temperature must be at least 0, got {options.temperature}")
    return options


if __name__ == "__main__":
    run_stage(main)
