"""A base made here learns from the train split, all of its tokens and nothing else."""

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import normalizers

from infini_retrofit.bases.scratch import NextTokenLoss, ScratchBase, pack_rows, train_tokenizer
from infini_retrofit.bases.sources import bring_base
from infini_retrofit.model.base import load_tokenizer
from infini_retrofit.pipeline.params import load_choice
from infini_retrofit.texts.articles import read_splits
from infini_retrofit.texts.corpora import CORPORA, FilesCorpus
from infini_retrofit.texts.splits import read_articles
from stages import prepare_base, prepare_wikitext
from tests.tiny import assert_same_model, random_ids
from tests.tiny_project import write_params

SIZES = {"num_layers": 2, "hidden_size": 48, "num_heads": 3, "vocab_size": 290}
SIZES |= {"tokens_per_sample": 37, "samples": 50, "epochs": 2, "batch_size": 4}
SIZES |= {"lr": 1e-2, "seed": 5}
NUM_ARTICLES = 24
WORDS = ["the", "river", "town", "dog", "sleeps", "by", "sea", "and", "1984", "old", "stone"]
WORDS += ["bridge", "over", "water"]
# Combining accents, half a family, spaces, control characters, and the end of a text in words.
HARD_TEXTS = ["e\u0301 \ufb01 \U0001f469\u200d", " two  \t\r\n\n .", "\x00\x7f\u2028"]
HARD_TEXTS += ["<|endoftext|> said he , don 't !"]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Short articles of few words in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    chooser = random.Random(0)
    for i in range(NUM_ARTICLES):
        Path(f"texts/{i:02}.txt").write_text(" ".join(chooser.choices(WORDS, k=60)))
    return FilesCorpus(path="texts", val_share=0.25, test_share=0.25)


def load(corpus, **over):
    return ScratchBase(**SIZES | over).load("mine", corpus)


def bring(corpus, folder, name="mini", **over):
    bring_base(ScratchBase(**SIZES | over), name, folder, "mine", corpus)


def train_texts(corpus):
    return [article.text for article in read_splits(corpus)["train"]]


def weights(base):
    return torch.cat([parameter.detach().flatten() for parameter in base.model.parameters()])


def mean_nll(base, rows):
    with torch.no_grad():
        logits = base.model(rows, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def test_equal_runs_give_equal_bytes_and_another_seed_other_weights(corpus, tmp_path):
    for name in ("one", "two"):
        bring(corpus, tmp_path / name)
    one, two = ((tmp_path / name / "manifest.json").read_bytes() for name in ("one", "two"))
    assert one == two
    made, other = load(corpus), load(corpus, seed=6)
    assert_same_model(tmp_path / "one", made.model)
    assert not torch.equal(weights(made), weights(other))


def test_training_learns_more_than_the_frequencies_of_tokens(corpus):
    trained, untrained = load(corpus, epochs=12), load(corpus, epochs=0)
    sizes = SIZES["tokens_per_sample"], SIZES["samples"]
    rows = pack_rows(trained.tokenizer, train_texts(corpus), *sizes)
    shares = torch.bincount(rows.flatten()).double() / rows.numel()
    unigram = -(shares * shares.clamp_min(1e-12).log()).sum().item()
    assert mean_nll(trained, rows) < unigram < mean_nll(untrained, rows)


def test_the_loss_is_each_token_s_against_the_one_before_it(corpus):
    base = load(corpus, epochs=0)
    ids = random_ids(SIZES["vocab_size"], 3, 11)
    loss = NextTokenLoss(base.model)(ids)["loss"].item()
    assert loss == pytest.approx(mean_nll(base, ids), rel=1e-5)
    shifted_twice = base.model(ids[:, :-1], labels=ids[:, 1:]).loss.item()
    assert loss != pytest.approx(shifted_twice, rel=1e-5)


def test_only_articles_of_the_train_split_are_read_from(corpus):
    titles = {article.title for article in read_splits(corpus)["train"]}
    assert 0 < len(titles) < NUM_ARTICLES
    before = load(corpus)
    for path in Path("texts").iterdir():
        if path.name not in titles:
            path.write_text(f"another text, of other words, in place of {path.name}")
    after = load(corpus)
    assert torch.equal(weights(before), weights(after))
    assert before.tokenizer.get_vocab() == after.tokenizer.get_vocab()
    path = Path("texts", min(titles))
    path.write_text(path.read_text()[::-1])
    assert not torch.equal(weights(before), weights(load(corpus)))


def test_diverged_training_names_the_step_and_the_old_base_stays(corpus, tmp_path):
    bring(corpus, tmp_path / "base", "old", epochs=0)
    message = r"^pretraining diverged after step 1: the loss is (nan|inf); .* models\.\*\.lr$"
    with pytest.raises(FloatingPointError, match=message):
        bring(corpus, tmp_path / "base", "new", lr=1e38, epochs=1)
    assert json.loads((tmp_path / "base/base.json").read_text())["name"] == "old"


def test_sizes_that_fit_neither_heads_nor_corpus_are_refused(corpus):
    with pytest.raises(ValueError, match=r"hidden_size must be a multiple of 24 .*, got 40"):
        load(corpus, hidden_size=40)
    with pytest.raises(ValueError, match=r"vocab_size must be at most \d{3} .*, got 5000"):
        load(corpus, vocab_size=5000)
    with pytest.raises(ValueError, match=r"tokens_per_sample must be .* \d+ tokens, got 99999"):
        load(corpus, tokens_per_sample=99_999)


def test_the_stage_trains_on_the_train_split_of_the_next_stage(corpus, tmp_path):
    sizes = {f"models.pythia-mini.{name}": value for name, value in SIZES.items()}
    own = {f"corpora.my-texts.{name}": value for name, value in vars(corpus).items()}
    write_params(tmp_path, {"model": "pythia-mini", "corpus": "my-texts", **sizes, **own})
    prepare_base.main()
    prepare_wikitext.main()
    about = json.loads(Path("models/base/base.json").read_text())
    train = read_articles(Path("data/wikitext"), "train")
    assert about["note"].endswith(f"on the train split of my-texts ({len(train)} articles)")
    chosen = load_choice(CORPORA, "corpus", "corpora")
    assert train_texts(chosen) == [article.text for article in train]


def assert_keeps_every_text(tokenizer):
    for text in HARD_TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_tokenizer_keeps_every_text_through_files(corpus, tmp_path):
    tokenizer = train_tokenizer(train_texts(corpus), SIZES["vocab_size"])
    assert len(tokenizer) == SIZES["vocab_size"]
    assert_keeps_every_text(tokenizer)
    bring(corpus, tmp_path / "base", epochs=0)
    loaded = load_tokenizer(tmp_path / "base")
    assert [loaded.encode(x) for x in HARD_TEXTS] == [tokenizer.encode(x) for x in HARD_TEXTS]
    assert len(loaded.encode(" river")) < len(" river")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(AssertionError):
        assert_keeps_every_text(tokenizer)


def test_rows_are_the_texts_one_after_another_each_with_its_end():
    texts = ["the old bridge", "water", "the sea and the river"] * 4
    tokenizer = train_tokenizer(texts, 270)
    rows = pack_rows(tokenizer, texts, 7, 1000)
    ids = tokenizer.encode("<|endoftext|>".join(texts) + "<|endoftext|>")
    assert rows.flatten().tolist() == ids[: len(ids) // 7 * 7]
    assert len(ids) % 7
    assert pack_rows(tokenizer, texts, 7, 2).tolist() == rows[:2].tolist()
