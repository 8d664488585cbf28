"""What distance of context is worth to the untouched base, by corpus.

Two segments of each document are scored after exactly 64, 256, 512, 1,024 and all tokens before
them, the text encoded anew from there. What a longer context wins over 512 tokens is the prize of
a memory behind a window of 512. Key tokens are those on which it wins more than 1 nat. Every
article of a corpus that is long enough may be drawn, whatever its split: the base trains on none.
Prints a table and the rows of results/context_worth.tsv.

Reads: params.yaml (corpora), models/base

Source of the key tokens: Fang et al. 2024, arXiv:2410.23771.

Axes:
    T  token of a document
    L  token of a scored segment
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from analysis.programs import BASE, at_least, make_parser, open_model, print_growing
from infini_retrofit.evaluation.bootstrap import paired_bootstrap
from infini_retrofit.model.running import run_in_layer
from infini_retrofit.pipeline.beginnings import first_tokens
from infini_retrofit.pipeline.files import verify_manifest, write_text
from infini_retrofit.pipeline.params import load_presets
from infini_retrofit.scoring.score import next_token_nlls
from infini_retrofit.texts.articles import read_splits
from infini_retrofit.texts.corpora import CORPORA
from infini_retrofit.texts.splits import (
    Document,
    by_turns,
    cut_documents,
    group_of,
    open_tokenizer,
    title_order,
    tokenize,
)

CONTEXTS = (64, 256, 512, 1024)  # tokens, and all
WINDOW = 512  # tokens: a context that every model affords
SCORED = 256  # tokens of a segment
KEY_GAIN = 1.0  # nats
ROWS = Path("results/context_worth.tsv")


def main(arguments: Sequence[str] | None = None) -> None:
    """Score each corpus and print a row of the table as soon as it is there."""
    options = _options(arguments)
    verify_manifest(BASE, made_by="dvc repro prepare_base")
    model, _ = open_model(BASE)
    scores = []

    def rows() -> Iterator[list[str]]:
        for name in options.corpora:
            documents = draw_documents(name, options.documents, options.tokens)
            scores.append(score_corpus(model, documents, name))
            yield cells(scores[-1])

    gains = [f"{WINDOW} -> all wins", "95% interval", "key tokens", "they carry"]
    names = [f"after {context:,}" for context in CONTEXTS]
    print_growing(["corpus (documents)", *names, "after all", *gains], rows())
    write_text(ROWS, pd.concat(scores).to_csv(sep="\t", index=False, float_format="%.6f"))


def draw_documents(name: str, number: int, tokens: int) -> list[Document]:
    """Draw documents of as many sources, and then articles, of a corpus as possible."""
    corpora = load_presets(CORPORA, "corpora")
    if name not in corpora:
        raise ValueError(f"--corpora must be of {', '.join(sorted(corpora))}, got {name}")
    articles = [article for split in read_splits(corpora[name]).values() for article in split]
    long = by_turns(a for a in sorted(articles, key=title_order) if len(a.text) > tokens)
    tokenizer = open_tokenizer(BASE / "tokenizer.json")
    pieces = tqdm(tokenize(tokenizer, long), f"tokenise {name}", len(long), leave=False)
    enough = list(islice((a for a in pieces if len(a.input_ids) >= tokens), number))
    documents = cut_documents(enough, tokens, len(first_tokens(tokenizer)))[:number]
    if len(documents) < number:
        raise ValueError(
            f"{name} must have {number} documents of {tokens} tokens, got {len(documents)}"
        )
    return documents


def corpus_options(
    command: str, about: str, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Read the options of a program that draws documents of one corpus."""
    parser = make_parser(command, about, least_documents=2)
    parser.set_defaults(documents=20)
    add = parser.add_argument
    add("--corpus", default="python-sources", help="a key of `corpora` in params.yaml")
    return parser.parse_args(arguments)


def score_corpus(
    model: PreTrainedModel, documents: Sequence[Document], name: str
) -> pd.DataFrame:
    """Score documents after each context: a row for each document and context.

    `key_share` is the share of key tokens, and `key_nats` what they win, in nats a token of all;
    both compare a context with one of `WINDOW` tokens.
    """
    rows = []
    for document in tqdm(documents, desc=name, leave=False):
        ids = torch.from_numpy(document.input_ids).long().to(model.device)
        begins = [round(len(ids) * place) // SCORED * SCORED for place in (11 / 16, 15 / 16)]
        nlls = {
            context: torch.cat([score_after(model, ids, begin, context) for begin in begins])
            for context in (*CONTEXTS, None)
        }
        for context, nll in nlls.items():
            gain = nlls[WINDOW] - nll
            is_key = gain > KEY_GAIN
            rows.append(
                {
                    "corpus": name,
                    "document": f"{document.title}, part {document.part}",
                    "source": group_of(document),
                    "context": "all" if context is None else context,
                    "nll": nll.mean().item(),
                    "key_share": is_key.double().mean().item(),
                    "key_nats": (gain * is_key).mean().item(),
                }
            )
    return pd.DataFrame(rows)


@torch.inference_mode()
def score_after(
    model: PreTrainedModel, ids: Int[Tensor, "T"], begin: int, context: int | None
) -> Float[Tensor, "L"]:
    """Score the segment from token `begin` on, after so many tokens of context; None: all."""
    first = 0 if context is None else begin - context
    row = ids[first : begin + SCORED]
    hidden = run_in_layer(model, row[None], segment_length=len(row))[0]
    return next_token_nlls(model, row[-SCORED - 1 :], hidden[-SCORED - 1 :]).double().cpu()


def cells(scores: pd.DataFrame) -> list[str]:
    """Write a corpus's row: nats a token by context, and what lies beyond the window."""
    table = scores.pivot(index="document", columns="context", values="nll")
    sources = scores.groupby("document")["source"].first()[table.index]
    gain, *ends = paired_bootstrap((table[WINDOW] - table["all"]).to_numpy(), list(sources))
    keys = scores[scores["context"] == "all"][["key_share", "key_nats"]].mean()
    return [
        f"{scores['corpus'].iloc[0]} ({len(table)})",
        *(f"{table[context].mean():.3f}" for context in (*CONTEXTS, "all")),
        f"{gain:.3f}",
        "{:.3f} to {:.3f}".format(*ends),
        f"{keys['key_share']:.1%}",
        f"{keys['key_nats']:.3f}",
    ]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = "Score the untouched base after ever longer contexts, by corpus."
    parser = make_parser("context_worth", about)
    parser.set_defaults(documents=20)
    add, corpora = parser.add_argument, ["wikipedia-sample", "python-sources"]
    add("--corpora", nargs="+", default=corpora, help="keys of `corpora` in params.yaml")
    least = at_least(4096, "token")
    add("--tokens", type=least, default=4096, help="of each document; two segments are scored")
    return parser.parse_args(arguments)
