"""Stage `prepare_longdocs`: cut documents of equal length.

A document is in the split in which the sliding text has its article.

Reads:  params.yaml (longdocs, corpora), data/wikitext/{train,val,test}.parquet,
        models/base/tokenizer.json
Writes: data/longdocs/{train,val,test}.parquet and their manifest.json
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

from infini_retrofit.pipeline.beginnings import first_tokens
from infini_retrofit.pipeline.files import write_manifest
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import load_choice, load_section
from infini_retrofit.pipeline.progress import note, progress
from infini_retrofit.texts.articles import read_splits
from infini_retrofit.texts.corpora import CORPORA, SAME, Corpus, LongdocsParams, PromptsCorpus
from infini_retrofit.texts.prompts import PromptMaker
from infini_retrofit.texts.splits import (
    SPLITS,
    Article,
    Document,
    TokenizedArticle,
    by_turns,
    cut_documents,
    group_of,
    open_tokenizer,
    read_articles,
    same_title,
    text_digest,
    title_order,
    tokenize,
    write_rows,
)

TOKENIZER = Path("models/base/tokenizer.json")
WIKITEXT = Path("data/wikitext")
LONGDOCS = Path("data/longdocs")


def main() -> str:
    """Run the stage and return what it made."""
    params = load_section(LongdocsParams, "longdocs")
    tokenizer = open_tokenizer(TOKENIZER)
    num_first = len(first_tokens(tokenizer))
    articles = {split: read_articles(WIKITEXT, split) for split in SPLITS}
    corpus = None
    if params.corpus != SAME:
        corpus = load_choice(CORPORA, "longdocs.corpus", "corpora")
    if corpus is not None and not isinstance(corpus, PromptsCorpus):
        split_of = {k: split for split in SPLITS for a in articles[split] for k in identity(a)}
        articles = {
            split: list(take_enough(tokenize(tokenizer, by_turns(of_split)), params))
            for split, of_split in read_other_corpus(corpus, split_of).items()
        }
    check_lengths(articles, params.tokens_per_document)
    most = None if params.documents == "all" else params.documents
    documents = {
        split: cut_documents(articles[split], params.tokens_per_document, num_first)
        for split in SPLITS
    }
    if isinstance(corpus, PromptsCorpus):
        documents = add_prompts(corpus, documents, articles, tokenizer)
    documents = {split: of_split[:most] for split, of_split in documents.items()}
    check_sources(documents["test"], params.tokens_per_document)
    for split in SPLITS:
        write_rows(LONGDOCS, split, documents[split])
    write_manifest(LONGDOCS)
    made = [f"documents of {params.tokens_per_document:,} tokens"]
    for split, of_split in documents.items():
        num_articles = len({document.title for document in of_split})
        num_tokens = sum(len(document.input_ids) for document in of_split)
        made.append(
            f"{split} {len(of_split):,} from {num_articles:,} articles with {num_tokens:,} tokens"
        )
    return f"prepare_longdocs: {', '.join(made)}"


def add_prompts(
    corpus: PromptsCorpus,
    documents: dict[str, list[Document]],
    articles: dict[str, list[TokenizedArticle]],
    tokenizer: Tokenizer,
) -> dict[str, list[Document]]:
    """Return prompts of each split, and text among them at equal distances."""
    made = {}
    for split, text in documents.items():
        maker = PromptMaker(tokenizer, [a.input_ids for a in articles[split]], split)
        length, number = len(text[0].input_ids), getattr(corpus, split)
        if length < maker.least_tokens:
            raise ValueError(
                f"longdocs.tokens_per_document must be at least {maker.least_tokens}, a prompt's "
                f"needle and question with this tokenizer, got {length}"
            )
        made[split] = []
        for i in progress(range(number), f"prompts of {split}", "documents"):
            num_text = int((i + 1) * corpus.text_share)
            if num_text > int(i * corpus.text_share):
                made[split].append(text[(num_text - 1) % len(text)])
            else:
                ids = maker.document(i, length, corpus.prompts)
                made[split].append(Document(f"prompt {i}", 0, ids))
    return made


def read_other_corpus(corpus: Corpus, split_of: dict[str | bytes, str]) -> dict[str, list[Article]]:
    """Read the documents' own corpus without articles of another split, in `title_order`.

    Args:
        corpus: the documents' own.
        split_of: the split of each title and each text's digest of the sliding text. The two
            corpora may share an article and put it into different splits.
    """
    splits = read_splits(corpus)
    kept = {
        split: [
            article
            for article in sorted(of_split, key=title_order)
            if all(split_of.get(key, split) == split for key in identity(article))
        ]
        for split, of_split in splits.items()
    }
    for split in SPLITS:
        if num_dropped := len(splits[split]) - len(kept[split]):
            note(
                f"{num_dropped:,} of {len(splits[split]):,} articles of {split} are left out: "
                "another split of the sliding text has their title or a copy of their text"
            )
    return kept


def identity(article: Article) -> tuple[str, bytes]:
    """Return what an article must not share with one of another split: its title, its text."""
    return same_title(article.title), text_digest(article)


def take_enough(
    articles: Iterable[TokenizedArticle], params: LongdocsParams
) -> Iterator[TokenizedArticle]:
    """Yield articles until enough are long: `cut_documents` takes all first parts first."""
    found = 0
    for article in progress(articles, "tokenise documents", "articles"):
        yield article
        found += len(article.input_ids) >= params.tokens_per_document
        if found == params.documents:
            return


def check_lengths(articles: dict[str, list[TokenizedArticle]], tokens_per_document: int) -> None:
    """Refuse a length that leaves a split without documents."""
    for split, of_split in articles.items():
        longest = max((len(article.input_ids) for article in of_split), default=0)
        if longest < tokens_per_document:
            raise ValueError(
                f"longdocs.tokens_per_document must leave a document in each split, "
                f"got {tokens_per_document}: the longest article of {split} has {longest} tokens"
            )


def check_sources(documents: list[Document], tokens_per_document: int) -> None:
    """Refuse test documents of a single source, whose memories cannot be swapped."""
    sources = {group_of(document) for document in documents}
    if len(sources) < 2:
        raise ValueError(
            f"longdocs.tokens_per_document must leave test documents of at least 2 articles or "
            f"packages, whose memories can be swapped, got {tokens_per_document}: {len(sources)} "
            "is that long"
        )


if __name__ == "__main__":
    run_stage(main)
