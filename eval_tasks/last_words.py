"""Cut articles before the last word of a sentence, for the task `article_last_word`."""

import re

from datasets import Dataset

DISTANCE = 4000  # characters between two words that the task asks for
# A word of letters between a space and the end of a sentence.
_LAST_WORD = re.compile(r" [^\W\d_]{3,}(?=[.!?]\s)")


def cut(articles: Dataset) -> Dataset:
    """Return a row for each word: its `context`, and the `word` with the space before it.

    Raises:
        ValueError: if no article is long enough.
    """
    rows = [row for text in articles["text"] for row in _rows(text)]
    if not rows:
        raise ValueError(
            f"texts of article_last_word must go on for a sentence after {DISTANCE} characters, "
            f"got {len(articles)} that do not"
        )
    return Dataset.from_list(rows)


def _rows(text: str) -> list[dict[str, str]]:
    """Return the next last word after every `DISTANCE` characters."""
    rows, begin = [], DISTANCE
    while word := _LAST_WORD.search(text, begin):
        rows.append({"context": text[: word.start()], "word": word.group()})
        begin = word.end() + DISTANCE
    return rows
