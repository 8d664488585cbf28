"""Articles of every source: dumps, WikiText, the user's files, the Hub."""

import bz2
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infini_retrofit.texts import articles, hub
from infini_retrofit.texts.articles import read_corpus, read_dump, read_files, read_splits
from infini_retrofit.texts.corpora import FilesCorpus, HubCorpus, HubSplits
from infini_retrofit.texts.splits import Article
from infini_retrofit.texts.wikitext import join_tokens, split_wikitext

SHARES = {"val_share": 0.2, "test_share": 0.3}
COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"


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


def test_a_changed_sample_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(articles, "SAMPLE_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"shortened\.bz2 must have the sha256 0000"):
        articles.read_gensim_sample()


WIKITEXT = [  # rows as on the Hub, where a blank line is an empty row
    "",
    " = Homarus gammarus = \n",
    "",
    " The so @-@ called \" lobster \" ( 1 @,@ 000 \u2013 2 @.@ 5 kg ) isn 't the boys ' pet . \n",
    "",
    " = = Empty = = \n",
    "",
    "",
    " = = = Emptier = = = \n",
    "",
    "",
    " = = Life = = \n",
    "",
    "",
    " = = = Birth = = = \n",
    "",
    " Born at 10 : 30 , it 's told . \n",
    " = 1 = \n",
    "",
    " = = 2 = = \n",
    " = a = b \n",
    "",
    "",
    " = Next = \n",
    "",
    "",
    " = = First = = \n",
    "",
    " Text ; end \n",
    "",
    " = = Nothing follows = = \n",
    "",
    " = Bare = \n",
]
LOBSTER = Article(
    "Homarus gammarus",
    "Homarus gammarus\n\n"
    "The so-called \"lobster\" (1,000\u20132.5 kg) isn't the boys' pet.\n\n"
    "Life\n\nBirth\n\nBorn at 10: 30, it's told.\n\n"
    "= 1 =\n\n= = 2 = =\n\n= a = b",
)
NEXT = Article("Next", "Next\n\nFirst\n\nText; end")
BARE = Article("Bare", "Bare")


def test_wikitext_is_cut_at_titles_and_reads_as_it_was_written():
    assert list(split_wikitext(WIKITEXT)) == [LOBSTER, NEXT, BARE]
    assert join_tokens(join_tokens(WIKITEXT[3])) == join_tokens(WIKITEXT[3])


def test_files_are_articles_and_rows_are_articles(tmp_path):
    (tmp_path / "deep").mkdir()
    # A title further down does not make a text WikiText.
    (tmp_path / "b.txt").write_text("Mine.\n\n = 1 = \n")
    (tmp_path / "deep" / "a.txt").write_bytes("\ufeffOne \r\n\r\n\r\n\r\ntwo\u00e9\n".encode())
    (tmp_path / "w.txt").write_text(
        "".join(line or " \n" for line in WIKITEXT), encoding="utf-8"
    )
    (tmp_path / "ignored.md").write_text("no")
    table = pa.table({"text": ["x", None, "z"], "title": ["X", "Y", None], "other": [1, 2, 3]})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert read_files(tmp_path) == [
        Article("b.txt", "Mine.\n\n = 1 ="),
        Article("deep/a.txt", "One\n\ntwo\u00e9"),
        Article("X", "x"),
        Article("rows.parquet row 2", "z"),
        LOBSTER,
        NEXT,
        BARE,
    ]
    corpus = FilesCorpus(path=str(tmp_path / "deep" / "a.txt"), **SHARES)
    assert read_corpus(corpus) == [Article("a.txt", "One\n\ntwo\u00e9")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\n", r"a\.txt must hold text, got an empty file"),
        ("a.txt", b"caf\xe9 au lait", r"a\.txt must be UTF-8 text: .* byte 0xe9 in position 3"),
        ("a.parquet", b"none", r"a\.parquet must be a parquet file"),
        ("a.parquet", {"words": ["x"]}, r"a\.parquet must have a column text .* got words"),
        ("a.parquet", {"text": [1]}, r"a\.parquet must have .* strings, got text \(int64\)"),
        ("a.parquet", {"text": ["x"], "title": [["y"]]}, r"got text .*, title \(list<"),
        ("a.parquet", {"text": [b"x", b"caf\xe9"]}, r"a\.parquet row 1 must be UTF-8 .* 0xe9"),
        ("a.parquet", {"text": ["x", "a\0"]}, r"a\.parquet row 1 must be UTF-8 text, got control"),
        ("a.csv", b"x", r"path must hold \*\.txt or \*\.parquet files, got .*: 1 \.csv"),
        *(
            ("a.txt", text.encode(encoding), r"a\.txt must be UTF-8 text(,.* from|:.* in) line 1")
            for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32-le")
            for text in ("Two\nlines", "caf\u00e9 au lait", "\u043f\u0440\u0438", "\u3042\u3001")
        ),
    ],
)
def test_a_bad_file_is_refused_by_name(name, content, message, tmp_path):
    if isinstance(content, dict):
        pq.write_table(pa.table(content), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_files(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is missing"):
        read_files(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()),
        *(pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string())),
    ],
    ids=str,
)
def test_a_column_of_any_type_of_text_is_read(tmp_path, kind):
    columns = {"text": ["\ufeffone", "two"], "title": ["\u00c9n", None]}
    table = pa.table({name: pa.array(values).cast(kind) for name, values in columns.items()})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_files(tmp_path) == [Article("\u00c9n", "one"), Article("a.parquet row 1", "two")]


def test_titles_may_be_numbers(tmp_path):
    pq.write_table(pa.table({"text": ["one", "two"], "title": [7, None]}), tmp_path / "a.parquet")
    assert read_files(tmp_path) == [Article("7", "one"), Article("a.parquet row 1", "two")]


def test_what_is_not_read_is_counted_by_kind(tmp_path, capsys):
    hidden = (".e.txt", ".git/f.txt", "g/.h/i.txt")
    for name in ("a.txt", "b.TXT", "c.txt.gz", "d", "j.txt/k", *hidden):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    pq.write_table(pa.table({"text": ["x", None, " \n"]}), tmp_path / "l.parquet")
    (tmp_path / "m.txt").symlink_to("gone")
    (tmp_path / "n").symlink_to("g")
    (tmp_path / "o.txt").symlink_to("d")
    titles = [article.title for article in read_files(tmp_path)]
    assert titles == ["a.txt", "l.parquet row 0", "o.txt"]
    assert capsys.readouterr().err.splitlines() == [
        f"note: not read in {tmp_path}: 1 .TXT, 1 .gz, 1 broken links or devices, "
        "3 hidden files or folders, 1 links to folders, 2 without an ending",
        f"note: 2 of 3 rows of {tmp_path / 'l.parquet'} hold no text",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_file_names_need_not_be_composed_nor_text(tmp_path):
    (tmp_path / "cafe\u0301.txt").write_text("one")
    (tmp_path / "caf\udce9.txt").write_text("two")
    titles = {article.title for article in read_files(tmp_path)}
    assert titles == {"caf\u00e9.txt", "caf\\udce9.txt"}


def hub_corpus(files: str = "raw/*.parquet") -> HubCorpus:
    return HubCorpus(repo_id="nobody/nothing", revision=COMMIT, files=files, **SHARES)


def test_the_hub_is_read_by_file_name_and_joined_across_files(monkeypatch, tmp_path):
    asked = {}

    def fetch(repo_id, revision, patterns, **options):
        asked.update(revision=revision, patterns=patterns, **options)
        return tmp_path, sorted(tmp_path.glob(patterns[0]))

    (tmp_path / "raw").mkdir()
    for number, lines in enumerate((WIKITEXT[:15], WIKITEXT[15:])):
        pq.write_table(pa.table({"text": lines}), tmp_path / "raw" / f"train-{number}.parquet")
    monkeypatch.setattr(hub, "fetch_snapshot", fetch)
    assert read_corpus(hub_corpus()) == [LOBSTER, NEXT, BARE]
    assert asked["revision"] == COMMIT
    assert asked["patterns"] == ["raw/*.parquet"]
    assert asked["repo_type"] == "dataset"
    with pytest.raises(ValueError, match=r"files must match parquet files in .* 'cooked/\*"):
        read_corpus(hub_corpus("cooked/*.parquet"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-0", "val-0"], r"with train, val and test.* got train-0.parquet, val-0.parquet"),
        (["train-0", "val-0", "test-0", "a"], "with train, val and test.* got a.parquet, test-0"),
        (["train-0", "val-0", "test"], "at least 2 articles, got train 3, val 3, test 1"),
    ],
)
def test_own_splits_need_articles_in_each_and_no_other_files(monkeypatch, tmp_path, names, message):
    for name in names:
        rows = WIKITEXT[:15] if name == "test" else WIKITEXT
        pq.write_table(pa.table({"text": rows}), tmp_path / f"{name}.parquet")
    found = tmp_path, sorted(tmp_path.iterdir())
    monkeypatch.setattr(hub, "fetch_snapshot", lambda *_, **__: found)
    corpus = HubSplits(repo_id="nobody/nothing", revision=COMMIT, files="*.parquet")
    with pytest.raises(ValueError, match=message):
        read_splits(corpus)
