"""Articles -> articles with tokens, by the base model's tokenizer.

Knows neither where articles come from nor what becomes of them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from infini_retrofit.corpus import Article, TokenizedArticle
from infini_retrofit.report import check_made

BATCH_ARTICLES = 16


def load_tokenizer(path: Path) -> Tokenizer:
    """Open a tokenizer.json, to be used without cutting or padding.

    Raises:
        FileNotFoundError: if the file is missing; the stage that makes it is named.
    """
    check_made(path, "dvc repro prepare_base")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenize(tokenizer: Tokenizer, articles: Sequence[Article]) -> Iterator[TokenizedArticle]:
    """Encode articles as they are asked for, without special tokens: nothing is added anywhere."""
    for begin in range(0, len(articles), BATCH_ARTICLES):
        batch = articles[begin : begin + BATCH_ARTICLES]
        encodings = tokenizer.encode_batch(
            [article.text for article in batch], add_special_tokens=False
        )
        for article, encoding in zip(batch, encodings, strict=True):
            input_ids = np.array(encoding.ids, np.int32)
            yield TokenizedArticle(article.title, article.text, input_ids)
