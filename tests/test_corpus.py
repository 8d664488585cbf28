"""Articles from every source, their cleaning, their split, and the files of tokens."""

import bz2
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infini_retrofit import hub
from infini_retrofit.articles import (
    check_sha256,
    read_corpus,
    read_dump,
    read_files,
    read_gensim_sample,
)
from infini_retrofit.corpus import (
    SPLITS,
    Article,
    FilesCorpus,
    GensimCorpus,
    HubCorpus,
    LongdocsParams,
    TokenizedArticle,
    cut_documents,
    read_articles,
    read_token_rows,
    split_articles,
    write_articles,
    write_documents,
)
from infini_retrofit.wikimarkup import clean_article
from infini_retrofit.wikitemplates import render_template
from infini_retrofit.wikitext import join_tokens, split_wikitext

SHARES = {"val_share": 0.2, "test_share": 0.3}
COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"

LEFTOVERS = {
    "emphasis": ("a ''b'' c", "''"),
    "links and templates": ("a [[b]]", r"\[\[|\]\]|\{\{|\}\}"),
    "tables": ("a\n|- b", r"^\s*[|!]|\{\||\|\}"),
    "tags": ("a <ref>b", r"</?(?:ref|br|sup|sub|div|span|small|math|code)\b"),
    "comments": ("a <!-- b", "<!--|-->"),
    "entities": ("a&nbsp;b", r"&(?:[a-z]+|#\d+);"),
    "categories and languages": ("a\nCategory:B", r"^(?:Category|File|Image|[a-z]{2,3}):"),
    "captions": ("thumb|b", r"\b(?:thumb|left|right|upright)\||\d+px\b|\.(?:jpg|svg|png)\b"),
    "source sections": ("a\n\nReferences\n\nb", r"^(?:References|External links|See also)$"),
    "empty parentheses": ("a ( , ) b", r"\([\s,;:]*\)|\(\s*[,;]|[,;]\s*\)"),
    "space before punctuation": ("a , b", r"(?<=\w) [,;](?:\s|$)|(?<=\w) \.(?:\s|$)"),
    "runs of spaces": ("a  b", "[ \t]{2}|[ \t]$|\u00a0"),
    "runs of empty lines": ("a\n\n\nb", "\n\n\n"),
    "headings": ("a\n== b ==", r"^==|==$"),
    "marks of our own": ("a \ue0000\ue001", "[\ue000-\uf8ff]"),
}


def tokenized(title: str, num_tokens: int, first: int = 0) -> TokenizedArticle:
    ids = np.arange(first, first + num_tokens, dtype=np.int32)
    return TokenizedArticle(title, f"text of {title}", ids)


@pytest.fixture(scope="module")
def sample() -> list[Article]:
    return read_gensim_sample()


@pytest.mark.parametrize("name", LEFTOVERS)
def test_no_article_of_the_sample_holds_leftovers_of_its_markup(name, sample):
    dirty, pattern = LEFTOVERS[name]
    assert re.search(pattern, dirty, re.M), "the pattern must be able to find something"
    found = {article.title: re.search(pattern, article.text, re.M) for article in sample}
    assert {title: match[0] for title, match in found.items() if match} == {}


def test_the_sample_is_as_large_as_the_numbers_say(sample):
    assert len(sample) == 98
    assert 2_700_000 < sum(len(article.text) for article in sample) < 3_000_000
    assert sum(len(article.text) < 1000 for article in sample) <= 5
    assert all(article.text.startswith(article.title + "\n\n") for article in sample)


def test_markup_becomes_an_encyclopedia():
    markup = """{{Infobox|name=''X''|map={{small|[[a|b]]}}}}
[[File:Map.png|thumb|A [[map]] of {{lang|la|X}}]]
'''X''' ({{IPA-el|x|pron}}; {{lang-el|\u03c7}}, ''khi'')<ref name="a">Not {{cite|x}}.</ref> is the
[[letter (alphabet)|letter]]s' friend ( {{respell|EKS}} , ) &mdash; 10<sup>6</sup>&nbsp;
km<sup>2</sup> .
<!-- no one
sees this -->
{| class="wikitable"
|-
| cell || {{flag|Y}}
{| nested
| x
|}
|}
== ''Uses'' ==
{{Main|Uses of X}}
* as in <math>x^{{2}}</math>
* [http://example.org the site], H<sub>2</sub>O
** {{cite book|title=Gone}}

: one line<br />next line
=== Empty ===
== Table only ==
The numbers are:
{| x
|}
== References ==
{{Reflist}}
=== Books ===
* A book
== After ==
''Iliad'''s hero.
[[Category:Letters]]
[[de:X]]"""
    assert clean_article(markup) == (
        "X (\u03c7, khi) is the letters' friend \u2014 10^6 km\u00b2.\n\n"
        "Uses\n\n"
        "- as in $x^{ {2} }$\n- the site, H2O\n\n"
        "one line\nnext line\n\n"
        "After\n\n"
        "Iliad's hero."
    )


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("a<ref>b</ref><ref name=c/> d", "a d"),
        ("[[wikt:word]], [[:Category:B|b]], [[Paris (Texas)|]], [[A: B]]", "word, b, Paris, A: B"),
        ("lost [[link and {{template", "lost link and template"),
        ("<nowiki>[[a]]</nowiki> and <nowiki/>b", "[[a]] and b"),
        ("Na<sup>+</sup>, 1<sup>st</sup>, e<sup>&minus;x</sup>", "Na+, 1st, e\u2212x"),
        ("one\ntwo\n\nthree", "one two\n\nthree"),
        ("<poem>one\ntwo</poem>", "one\ntwo"),
        ("* {{cite|x}}. Gone\n* kept", "- kept"),
        ("{{nowrap|a {{=}} 1}} {{small|b{{!}}c}}", "a = 1 b|c"),
        ("a (e.g. <ref>x</ref>) b", "a b"),
    ],
)
def test_markup_in_small(markup, text):
    assert clean_article(markup) == text


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("convert|1300|mi|km", "1,300 miles"),
        ("convert|5|to|10.5|km2|sqmi|0|abbr=on", "5 to 10.5 km\u00b2"),
        ("convert|5|ft|11|in|cm", "5 ft 11 in"),
        ("convert|4|mi|adj=on", "4-mile"),
        ("val|6.24|e=18|u=C", "6.24\u00d710^18 C"),
        ("frac|3|2", "3/2"),
        ("As of|2015|6|30", "As of 30 June 2015"),
        ("as of|2014|lc=y", "as of 2014"),
        ("nihongo|'''Aikido'''|\u5408|Aikid\u014d", "'''Aikido''' (\u5408, Aikid\u014d)"),
        ("coord|13|19|N|169|9|W|type:event", "13\u00b019'N 169\u00b09'W"),
        ("coord|32.7|-86.7|display=title", ""),
        ("lang-ru|link=no|text", "text"),
        ("transl|ar|ALA|Allah", "Allah"),
        ("quote|text=Words = deeds.", "\n\nWords = deeds.\n\n"),
        ("nowrap", ""),
        ("Infobox country|name=X|text", ""),
    ],
)
def test_a_template_shows_what_a_reader_sees(body, text):
    assert render_template(body) == text


def test_a_dump_gives_articles_without_redirects_homonyms_and_other_namespaces(tmp_path):
    pages = [
        ("A", 0, "'''A''' is [[b]]."),
        ("B", 0, "#REDIRECT [[A]]"),
        ("C", 0, "C may be:\n* c\n{{disambiguation}}"),
        ("Talk:A", 1, "talk"),
        ("D", 0, "{{only a box}}"),
    ]
    page = "<page><title>{}</title><ns>{}</ns><id>1</id><revision><text>{}</text></revision></page>"
    xml = "".join(page.format(*row) for row in pages)
    space = "http://www.mediawiki.org/xml/export-0.10/"
    path = tmp_path / "dump.bz2"
    path.write_bytes(bz2.compress(f'<mediawiki xmlns="{space}"><info/>{xml}</mediawiki>'.encode()))
    assert list(read_dump(path)) == [Article("A", "A\n\nA is b.")]


def test_a_changed_sample_is_refused_by_name(tmp_path):
    path = tmp_path / "sample.bz2"
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"sample\.bz2 must have the sha256 0000"):
        check_sha256(path, "0" * 64)


WIKITEXT = [
    " \n",
    " = Homarus gammarus = \n",
    " \n",
    " The so @-@ called \" lobster \" ( 1 @,@ 000 \u2013 2 @.@ 5 kg ) isn 't the boys ' pet . \n",
    " = = Empty = = \n",
    " = = = Emptier = = = \n",
    " = = Life = = \n",
    " = = = Birth = = = \n",
    " Born at 10 : 30 , it 's told . \n",
    " = Next = \n",
    " Text ; end \n",
    " = = Nothing follows = = \n",
]
LOBSTER = (
    "Homarus gammarus\n\nThe so-called \"lobster\" (1,000\u2013 2.5 kg) isn't the boys' pet.\n\n"
    "Life\n\nBirth\n\nBorn at 10: 30, it's told."
).replace("\u2013 2", "\u20132")


def test_wikitext_is_cut_at_titles_and_reads_as_it_was_written():
    articles = list(split_wikitext(WIKITEXT))
    assert articles == [Article("Homarus gammarus", LOBSTER), Article("Next", "Next\n\nText; end")]


def test_joined_tokens_are_stable():
    assert join_tokens(join_tokens(WIKITEXT[3])) == join_tokens(WIKITEXT[3])


def test_files_are_articles_and_rows_are_articles(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_bytes("\ufeffOne \r\n\r\n\r\n\r\ntwo\u00e9\n".encode())
    (tmp_path / "w.txt").write_text("".join(WIKITEXT), encoding="utf-8")
    (tmp_path / "ignored.md").write_text("no")
    table = pa.table({"text": ["x", None, "z"], "title": ["X", "Y", None], "other": [1, 2, 3]})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert read_files(tmp_path) == [
        Article("deep/a.txt", "One\n\ntwo\u00e9"),
        Article("X", "x"),
        Article("rows.parquet row 2", "z"),
        Article("Homarus gammarus", LOBSTER),
        Article("Next", "Next\n\nText; end"),
    ]
    corpus = FilesCorpus(path=str(tmp_path / "deep" / "a.txt"), **SHARES)
    assert read_corpus(corpus) == [Article("a.txt", "One\n\ntwo\u00e9")]


def test_a_title_further_down_does_not_make_a_text_wikitext(tmp_path):
    (tmp_path / "a.txt").write_text("Mine.\n = 1 = \n")
    assert read_files(tmp_path) == [Article("a.txt", "Mine.\n = 1 =")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\n", r"a\.txt must hold text, got an empty file"),
        ("a.txt", b"caf\xe9 au lait", r"a\.txt must be UTF-8 text, got byte 0xe9 at position 3"),
        ("a.parquet", b"none", r"a\.parquet must be a parquet file"),
        ("a.parquet", {"words": ["x"]}, r"a\.parquet must have a column text .* got words"),
        ("a.parquet", {"text": [1]}, r"a\.parquet must have a column text .* of strings"),
        ("a.parquet", {"text": ["", None]}, r"a\.parquet must hold text, got an empty file"),
        ("a.csv", b"x", r"path must hold \*\.txt or \*\.parquet files"),
    ],
)
def test_a_bad_file_is_refused_by_name(name, content, message, tmp_path):
    if isinstance(content, dict):
        pq.write_table(pa.table(content), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_files(tmp_path)


def test_a_missing_path_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is missing"):
        read_files(tmp_path / "nowhere")


def hub_corpus(name: str = "raw") -> HubCorpus:
    return HubCorpus(repo_id="nobody/nothing", revision=COMMIT, name=name, **SHARES)


def test_the_hub_is_read_by_file_name_and_joined_across_files(monkeypatch, tmp_path):
    asked = {}

    def fetch(repo_id, revision, patterns, **options):
        asked.update(repo_id=repo_id, revision=revision, patterns=patterns, **options)
        return tmp_path

    (tmp_path / "raw").mkdir()
    for number, lines in enumerate((WIKITEXT[:6], WIKITEXT[6:])):
        pq.write_table(pa.table({"text": lines}), tmp_path / "raw" / f"train-{number}.parquet")
    monkeypatch.setattr(hub, "fetch_snapshot", fetch)
    assert [article.title for article in read_corpus(hub_corpus())] == ["Homarus gammarus", "Next"]
    assert read_corpus(hub_corpus())[0].text == LOBSTER
    assert asked["revision"] == COMMIT
    assert asked["patterns"] == ["raw/*.parquet"]
    assert asked["repo_type"] == "dataset"
    with pytest.raises(ValueError, match=r"name must be a folder of parquet files .* 'cooked'"):
        read_corpus(hub_corpus("cooked"))


def test_without_network_the_hub_points_to_the_embedded_default():
    with pytest.raises(ConnectionError, match=r"`corpus: wikipedia-sample`.* needs no network"):
        read_corpus(hub_corpus())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GensimCorpus(val_share=0.0, test_share=0.1), "val_share must be .* got 0.0"),
        (lambda: GensimCorpus(val_share=0.1, test_share=1.0), "test_share must be .* got 1.0"),
        (lambda: FilesCorpus(path="x", val_share=0.5, test_share=0.5), "must be below 1.*0.5"),
        (
            lambda: HubCorpus(repo_id="a/b", revision="main", name="c", **SHARES),
            "revision must be a commit of 40 hexadecimal digits, got 'main'",
        ),
        (lambda: LongdocsParams(tokens_per_document=1), "tokens_per_document must be .* got 1"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_article_stays_in_its_split_when_others_come():
    articles = [Article(f"title {i}", "text") for i in range(1000)]
    of_all = split_articles(articles, 0.2, 0.3)
    of_some = split_articles(articles[::-3], 0.2, 0.3)
    for split in SPLITS:
        assert set(of_some[split]) <= set(of_all[split])
        assert of_some[split] == [a for a in of_all[split] if a in set(of_some[split])]
    shares = [len(of_all[split]) / 1000 for split in SPLITS]
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.05)


def test_the_split_is_the_same_on_every_machine():
    splits = split_articles([Article(f"title {i}", "text") for i in range(40)], 0.2, 0.3)
    assert [article.title for article in splits["val"]] == [
        "title 21",
        "title 38",
        "title 29",
        "title 24",
        "title 22",
        "title 37",
        "title 23",
        "title 36",
    ]


def test_too_few_articles_are_refused():
    articles = [Article(f"title {i}", "text") for i in range(3)]
    with pytest.raises(ValueError, match=r"at least 2 articles, got train \d, val \d, test \d"):
        split_articles(articles, 0.2, 0.3)


def test_documents_are_whole_and_come_from_many_articles_first():
    articles = [tokenized("a", 11), tokenized("b", 4, 100), tokenized("c", 3, 200)]
    articles += [tokenized("d", 8, 300)]
    documents = cut_documents(articles, 4)
    pieces = {
        (article.title, part): article.input_ids[4 * part : 4 * part + 4].tolist()
        for article in articles
        for part in range(len(article.input_ids) // 4)
    }
    assert {(d.title, d.part): d.input_ids.tolist() for d in documents} == pieces
    assert [d.part for d in documents] == [0, 0, 0, 1, 1]
    assert [d.title for d in documents] == [d.title for d in cut_documents(articles[::-1], 4)]


def test_files_hold_what_was_written_and_nothing_else(tmp_path):
    articles = [tokenized("a", 5), tokenized("b\u00e9", 1, 40), tokenized("c", 7, 90)]
    for folder in ("one", "two"):
        write_articles(tmp_path / folder, "val", articles)
        write_documents(tmp_path / folder, "test", cut_documents(articles, 2))
    for name in ("val.parquet", "test.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    read = read_articles(tmp_path / "one", "val")
    assert [(a.title, a.text, a.input_ids.tolist()) for a in read] == [
        (a.title, a.text, a.input_ids.tolist()) for a in articles
    ]
    rows = read_token_rows(tmp_path / "one" / "test.parquet")
    assert [row.tolist() for row in rows] == [
        d.input_ids.tolist() for d in cut_documents(articles, 2)
    ]
    assert all(row.dtype == np.int32 and row.flags.writeable for row in rows)
    assert pq.read_schema(tmp_path / "one" / "test.parquet").names == ["title", "part", "input_ids"]


def test_a_missing_file_names_the_stage_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `dvc repro prepare_wikitext`"):
        read_articles(tmp_path / "wikitext", "val")
    with pytest.raises(FileNotFoundError, match="run `dvc repro prepare_longdocs`"):
        read_token_rows(tmp_path / "longdocs" / "test.parquet")
