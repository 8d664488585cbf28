"""The sizes of a base that is made in a second, and a corpus of few words to make it from."""

import random
from pathlib import Path

from infini_retrofit.texts.corpora import FilesCorpus

SIZES = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_heads": 3,
    "vocab_size": 290,
    "tokens_per_sample": 37,
    "samples": 50,
    "epochs": 2,
    "batch_size": 4,
    "lr": 1e-2,
    "seed": 5,
}
NUM_ARTICLES = 24
WORDS = [
    *("the", "river", "town", "dog", "sleeps", "by", "sea"),
    *("and", "1984", "old", "stone", "bridge", "over", "water"),
]


def write_corpus() -> FilesCorpus:
    """Write short articles of few words into the working folder; say how to find them."""
    Path("texts").mkdir()
    chooser = random.Random(0)
    for i in range(NUM_ARTICLES):
        Path(f"texts/{i:02}.txt").write_text(" ".join(chooser.choices(WORDS, k=60)))
    return FilesCorpus(path="texts", val_share=0.25, test_share=0.25)
