"""Articles -> beginnings of articles that stop before the last word of a sentence."""

import re

from datasets import Dataset

# Characters of an article between two words that are asked for.
DISTANCE = 4000
# A word of letters between a space and the end of a sentence.
_LAST_WORD = re.compile(r" [^\W\d_]{3,}(?=[.!?]\s)")


def cut(articles: Dataset) -> Dataset:
    """Return a row for each word that is asked for: `context` and `word`, its space included.

    Raises:
        ValueError: if there is none.
    """
    rows = [row for text in articles["text"] for row in _rows(text)]
    if not rows:
        raise ValueError(
            f"texts of article_last_word must go on for a sentence after {DISTANCE} characters, "
            f"got {len(articles)} that do not"
        )
    return Dataset.from_list(rows)


def _rows(text: str) -> list[dict[str, str]]:
    """Ask for the first last word after each `DISTANCE` characters."""
    rows, begin = [], DISTANCE
    while word := _LAST_WORD.search(text, begin):
        rows.append({"context": text[: word.start()], "word": word.group()})
        begin = word.end() + DISTANCE
    return rows
