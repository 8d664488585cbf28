"""BOS stands before a text exactly where the tokenizer puts it: in documents, harness and chat."""

from argparse import Namespace

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from infini_retrofit.generation.conversation import Reader
from infini_retrofit.generation.generation import enable_generation
from infini_retrofit.pipeline.beginnings import first_tokens
from infini_retrofit.share.lm_eval import InfiniLM
from infini_retrofit.texts.splits import Article, cut_documents, open_tokenizer, tokenize
from tests.reference import infini_params
from tests.tiny import tiny_tokenizer
from tests.tiny_export import make_retrofit

END = "<|endoftext|>"
TEXT = "The quick brown fox jumps over the lazy dog. " * 9


@pytest.fixture(params=[True, False], ids=["with BOS", "without"])
def tokenizer(request):
    """A tokenizer that puts a token before a text and one behind it, or neither."""
    tokenizer = tiny_tokenizer()
    number = tokenizer.convert_tokens_to_ids(END)
    if request.param:
        both = TemplateProcessing(single=f"{END} $A {END}", special_tokens=[(END, number)])
        tokenizer.backend_tokenizer.post_processor = both
    assert first_tokens(tokenizer.backend_tokenizer) == [number] * request.param
    return tokenizer


def test_every_document_of_an_article_begins_so_and_holds_its_tokens_once(tokenizer, tmp_path):
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    opened = open_tokenizer(tmp_path / "tokenizer.json")
    first, plain = first_tokens(opened), opened.encode(TEXT, add_special_tokens=False).ids
    (article,) = tokenize(opened, [Article("a", TEXT)])
    assert article.input_ids.tolist() == first + plain
    documents = cut_documents([article], 20, len(first))
    assert all(d.input_ids[: len(first)].tolist() == first for d in documents)
    inside = np.concatenate([d.input_ids[len(first) :] for d in documents])
    assert inside.tolist() == plain[: len(inside)]
    assert {len(d.input_ids) for d in documents} == {20}
    assert len(plain) - len(inside) < 20 - len(first)


def test_the_harness_and_chat_put_it_before_a_text_once(tokenizer, tmp_path):
    make_retrofit(tmp_path, "llama")
    base = tmp_path / "models" / "base"
    lm = InfiniLM(str(tmp_path / "models" / "finetuned"), str(base), "float32", "cpu")
    lm.tokenizer, lm.first = tokenizer, first_tokens(tokenizer.backend_tokenizer)
    plain = tokenizer.encode("The dog", add_special_tokens=False)
    assert lm.tok_encode("The dog") == lm.first + plain
    assert lm.tok_encode("The dog", add_special_tokens=False) == plain
    assert lm.prefix_token_id == lm.eot_token_id == tokenizer.eos_token_id
    enable_generation(lm.model, infini_params())
    reader = Reader(lm.model, tokenizer, Namespace())
    assert reader.read("The dog").num_seen == len(lm.first) + len(plain)
