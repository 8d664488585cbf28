"""What a tokenizer puts before a text: BOS for some models, nothing for others.

The tokenizer alone decides, so that training, scoring, the harness, chat and an exported folder
agree. Knows no file.
"""

from itertools import takewhile

from tokenizers import Tokenizer


def first_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that a tokenizer puts before every text; none for most models."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    num_added = len(list(takewhile(bool, encoding.special_tokens_mask)))
    return encoding.ids[:num_added]
