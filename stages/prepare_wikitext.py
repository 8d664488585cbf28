"""Stage `prepare_wikitext`: articles -> clean text -> tokens, split by article.

Reads:  params.yaml (corpus, corpora), models/base/tokenizer.json
Writes: data/wikitext/{train,val,test}.parquet
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from infini_retrofit.articles import read_corpus
from infini_retrofit.corpus import (
    CORPORA,
    Article,
    TokenizedArticle,
    split_articles,
    write_articles,
)
from infini_retrofit.params import load_choice
from infini_retrofit.pipeline import run_stage

TOKENIZER = Path("models/base/tokenizer.json")
WIKITEXT = Path("data/wikitext")
BATCH_ARTICLES = 16


def main() -> None:
    """Run the stage."""
    corpus = load_choice(CORPORA, "corpus", "corpora")
    tokenizer = load_tokenizer(TOKENIZER)
    splits = split_articles(read_corpus(corpus), corpus.val_share, corpus.test_share)
    num_articles = sum(map(len, splits.values()))
    with tqdm(desc="tokenise", total=num_articles, unit=" articles") as progress:
        for split, articles in splits.items():
            write_articles(WIKITEXT, split, tokenize(tokenizer, articles, progress))


def load_tokenizer(path: Path) -> Tokenizer:
    """Open the base model's tokenizer, to be used without cutting or padding."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `dvc repro prepare_base` to make it")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenize(
    tokenizer: Tokenizer, articles: Sequence[Article], progress: tqdm
) -> list[TokenizedArticle]:
    """Encode articles without special tokens: no beginning of sequence is added anywhere."""
    tokenized = []
    for begin in range(0, len(articles), BATCH_ARTICLES):
        batch = articles[begin : begin + BATCH_ARTICLES]
        encodings = tokenizer.encode_batch(
            [article.text for article in batch], add_special_tokens=False
        )
        for article, encoding in zip(batch, encodings, strict=True):
            input_ids = np.array(encoding.ids, np.int32)
            tokenized.append(TokenizedArticle(article.title, article.text, input_ids))
        progress.update(len(batch))
    return tokenized


if __name__ == "__main__":
    run_stage(main)
