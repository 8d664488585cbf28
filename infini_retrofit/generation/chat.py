"""Read a document into a model's memory, then answer prompts from standard input.

`python -m infini_retrofit.generation.chat models/finetuned --document book.txt`. The model
continues each prompt as text right after the document. Every answer starts from the document's
memory, not from the answer before it, unless `--continue` is given.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from infini_retrofit.pipeline.guard import run_stage


def main(arguments: list[str] | None = None) -> None:
    """Read, then answer until the input ends."""
    parser = argparse.ArgumentParser(
        prog="python -m infini_retrofit.generation.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    add("model", type=Path, help="folder of a retrofitted model, like models/finetuned")
    add("--base", type=Path, default=Path("models/base"), help=f"folder of its base {default}")
    add("--document", type=Path, help="the text to read, in UTF-8")
    add("--cache", type=Path, help="where to save what is read, or to load it from")
    add("--continue", dest="goes_on", action="store_true", help="prompts follow the last answer")
    add("--template", action="store_true", help="put prompts into the tokenizer's chat template")
    add("--other-layers", choices=["segment", "full"], help="default: as the model says")
    add("--max-new-tokens", type=int, default=200, help=f"tokens of an answer {default}")
    add("--temperature", type=float, default=0.0, help="0 (default): the likeliest token")
    options = parser.parse_args(arguments)
    if options.document is None and options.cache is None:
        parser.error("--document or --cache must be given: there is nothing to read")
    if options.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if not 0 <= options.temperature < float("inf"):
        parser.error(f"--temperature must be at least 0, got {options.temperature}")
    text = None if options.document is None else read_text(options.document)
    # This imports torch, which takes seconds. Wrong arguments were refused before.
    from infini_retrofit.generation.conversation import chat

    chat(options, text, _prompts())


def read_text(path: Path) -> str:
    """Read a document, and refuse one without text or in another encoding than UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} must hold text, got {len(text)} characters of white space")
    return text


def _prompts() -> Iterable[str]:
    """Yield the lines of standard input that are not empty."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.rstrip("\n")


def command() -> None:
    """Run the command `infini-chat`."""
    run_stage(main)


if __name__ == "__main__":
    command()
