"""Stage `prepare_wikitext`: clean, split and tokenise the corpus.

Reads:  params.yaml (corpus, corpora), models/base/tokenizer.json
Writes: data/wikitext/{train,val,test}.parquet and their manifest.json
"""

from pathlib import Path

from infini_retrofit.pipeline.files import write_manifest
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import load_choice
from infini_retrofit.pipeline.progress import progress
from infini_retrofit.texts.articles import read_splits
from infini_retrofit.texts.corpora import CORPORA
from infini_retrofit.texts.splits import open_tokenizer, tokenize, write_rows

TOKENIZER = Path("models/base/tokenizer.json")
WIKITEXT = Path("data/wikitext")


def main() -> str:
    """Run the stage and return what it made."""
    corpus = load_choice(CORPORA, "corpus", "corpora")
    tokenizer = open_tokenizer(TOKENIZER)
    made = []
    for split, articles in read_splits(corpus).items():
        encoded = tokenize(tokenizer, articles)
        tokenized = list(progress(encoded, f"tokenise {split}", "articles", len(articles)))
        write_rows(WIKITEXT, split, tokenized)
        num_tokens = sum(len(article.input_ids) for article in tokenized)
        made.append(f"{split} {len(tokenized):,} articles with {num_tokens:,} tokens")
    write_manifest(WIKITEXT)
    return f"prepare_wikitext: {', '.join(made)}"


if __name__ == "__main__":
    run_stage(main)
