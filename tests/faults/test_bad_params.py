"""Bad parameters by the thousand: one sentence each, or accepted for a reason that stands here."""

import contextlib
import copy
import datetime
import math
import random
import re
import runpy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from infini_retrofit.pipeline.schema import leaves
from recipes.overlays import check_override
from stages import check_params
from tests.tiny_project import ROOT

pytestmark = pytest.mark.faults

SEED, NUM_CASES = 0, 2000
MISSING, UNKNOWN = "the key is missing", "a key beside it is unknown"
PRESENT = YAML(typ="safe").load(ROOT / "params.yaml") | {"model": "pythia-mini"}  # the fastest
KEYS = [
    *dict(leaves(PRESENT)),
    *(key for key, value in PRESENT.items() if isinstance(value, dict)),
    *(f"{table}.{name}" for table in ("models", "corpora") for name in PRESENT[table]),
    *("finetune.lora", "finetune.lr_scale"),
]
VALUES = [
    *(-1, 0, 1, 2, 257, 10**9, 10**18, -(10**18), 0.5, 2.0, -0.5, 1e30, 1e-320),
    *(math.nan, math.inf, -math.inf, True, False, None, datetime.date(2020, 1, 1), b"\0\xff"),
    *([], [1], ["a"], [[]], [True], [10**18], {}, {"a": 1}, {"source": []}, {"source": {"a": 1}}),
    *("", " ", "a", "12", "1e-3", "yes", "all", "same", "a\nb", "\0", "\x1b[31m", "\x85"),
    *("x" * 300, "x" * 5000, "..", "../../etc/passwd", "/etc/passwd", "a/../b", "\u03bb", "~"),
    *("$(touch x)", "python; ls", "${model}", "<script>", "%n%s", MISSING, UNKNOWN),
]

# What is accepted, as `key = value`, and why that is good.
ACCEPTED = {
    r"(models|corpora)\.[\w-]+ = 'the key is missing'": "a preset that is not chosen may go",
    r"(models|corpora)\.[\w-]+ = 'a key beside it is unknown'": "a preset may be added",
    r".*\.(val_)?samples = \d+": "at most so many, of those that there are",
    r".*\.(train_|val_)?documents = \d+": "at most so many, of those that there are",
    r"eval\.(window|stride|sliding_tokens) = \d+": "at most the whole text",
    r"longdocs\.tokens_per_document = \d+": "prepare_longdocs knows how long articles are",
    r".*\.(batch_size|epochs|patience|rank|alpha|num_heads|seed) = \d+(\.0)?": "in range",
    r".*\.(num_layers|vocab_size|hidden_size|tokens_per_sample) = \d{1,4}": "a size in range",
    r".*\.lr = (0\.5|[12](\.0)?)": "a rate up to 10",
    r"finetune\.lr_scale\.\w+ = (0|0\.5|1|2|2\.0|257|1e-320)": "a factor from 0 to 1000",
    r"finetune\.kl_weight = (0|0\.5|1|1e-320)": "a share from 0 to 1",
    r"corpora\..*_share = (0\.5|1e-320)": "between 0 and 1; a split has at least two articles",
    r"finetune\.label_shift = 2|finetune\.kl_weight = 1": "a choice",
    r"finetune_control\.\w+ = '(all|same)'|finetune\.trainable = 'all'": "a choice",
    r"infini\.(memory_)?layers = (\[1?\]|'all')": "layers of the base",
    r"corpora\..*\.(min_characters|files_per_package) = \d+": "at most all files",
    r"corpora\.passkey\.(train|val|test) = \d+": "as many prompts",
    r"corpora\.passkey\.text_share = (0|1|0\.5|1e-320)": "a share from 0 to 1",
    r"longcontext\.\w+ = (\[1?\]|\d+)": "as many prompts or tokens; an empty list asks nothing",
    r"infini\.(bptt_segments|local_context|num_features|segment_length) = \d+": "in range",
    r"infini\.(memory|seed_scaling) = (True|False)": "a choice",
    r"(models|corpora)\..*\.(path|file|files) = '.*'": "a path or pattern that no shell reads",
    r"(models|corpora)\..*\.(repo_id|package|version) = '[\w.-]+'": "a name that nobody can know",
    r"launcher = '[\w./-]+'": "a command, which the shell finds or names",
}

# Whole files; those that DVC 3.67 refuses itself are refused here as well, for all other callers.
FILES = {
    "empty": b"",
    "a comment": b"# nothing\n",
    "a list": b"- 1\n",
    "a number": b"3\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "latin-1": "model: \u00e9\n".encode("latin-1"),
    "utf-16": "model: a\n".encode("utf-16"),
    "binary": bytes(range(256)),
    "nul": b"model: a\0b\n",
    "tab": b"model:\n\ta: 1\n",
    "unclosed": b"model: [a\n",
    "unclosed text": b'model: "a\n',
    "duplicate": b"model: a\nmodel: b\n",
    "tag": b"model: !!python/object/apply:os.system [ls]\n",
    "own tag": b"model: !x a\n",
    "bad bool": b"model: !!bool a\n",
    "bad date": b"model: 2020-13-45\n",
    "alias": b"model: &a x\ncorpus: *a\n",
    "alias of itself": b"model: &a [*a]\n",
    "laughs": b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n",
    "merge of a number": b"<<: 3\n",
    "brackets": b"model: " + b"[" * 50_000,
    "braces": b"model: " + b"{a: " * 20_000,
    "dashes": b"- " * 40_000,
    "question marks": b"? " * 40_000,
    "digits": b"model: " + b"9" * 5_000,
    "escape beyond Unicode": b'model: "\\UFFFFFFFF"\n',
    "half a character": b'model: "\\ud800"\n',
    "list as key": b"? [1, 2]\n: 3\n",
    "mapping as key": b"? {a: 1}\n: 3\n",
    "number as key": b"1: 2\n",
    "directive": b"%YAML 9.9\n---\nmodel: a\n",
    "large": b"# comment\n" * 20_000,
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def all_cases() -> Iterator[tuple[str, Any]]:
    """Yield every key of params.yaml with every value that it does not have."""
    now = dict(leaves(PRESENT))
    for key in KEYS:
        for value in VALUES:
            if key not in now or repr(now[key]) != repr(value):
                yield key, value


def changed(key: str, value: Any) -> dict[str, Any]:
    params = copy.deepcopy(PRESENT)
    *sections, last = key.split(".")
    table = params
    for section in sections:
        table = table[section]
    if value is MISSING:
        del table[last]
    elif value is UNKNOWN:
        table[f"{last}_"] = copy.deepcopy(table[last])
    else:
        table[last] = value
    return params


def refusal() -> str | None:
    """Return the sentence with which params.yaml is refused; other exceptions pass through."""
    try:
        check_params.main()
    except (ValueError, OSError) as error:
        return str(error)
    return None


def reason(case: str) -> str | None:
    return next((why for what, why in ACCEPTED.items() if re.fullmatch(what, case, re.S)), None)


def test_bad_values_are_refused_by_name_or_good_for_a_reason():
    cases = random.Random(SEED).sample(list(all_cases()), NUM_CASES)
    counts, unexplained, nameless = Counter(), [], []
    for key, value in cases:
        with Path("params.yaml").open("w", encoding="utf-8") as file:
            YAML(typ="safe").dump(changed(key, value), file)
        said, case = refusal(), f"{key} = {value!r}"
        counts["accepted" if said is None else "refused"] += 1
        if said is None and reason(case) is None:
            unexplained.append(case)
        where = rf"{re.escape(key.split('.')[-1])}|line \d+ has the tag"
        if said is not None and (len(said) > 2500 or not re.search(where, said)):
            nameless.append(f"{case}: {said}")
    print(dict(counts))  # `pytest -s` shows them
    assert not unexplained, "\n".join(unexplained)
    assert not nameless, "\n".join(nameless)
    assert sum(counts.values()) == NUM_CASES


def test_damaged_bytes_of_the_file_are_refused_or_good():
    text, chance = (ROOT / "params.yaml").read_bytes(), random.Random(SEED)
    counts = Counter()
    for _ in range(200):
        damaged = bytearray(text)
        for _ in range(chance.choice((1, 3, 30))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        Path("params.yaml").write_bytes(damaged)
        counts["accepted" if refusal() is None else "refused"] += 1
    print(dict(counts))  # a comment may hold anything
    assert counts["refused"] > 100


@pytest.mark.parametrize("name", FILES)
def test_the_command_refuses_a_file_in_one_sentence(name):
    Path("params.yaml").write_bytes(FILES[name])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(check_params.__file__, run_name="__main__")  # as `python -m` does
    assert re.fullmatch(r"error: [^\n]{10,1000}", str(ended.value.code))


def test_overrides_of_any_text_are_refused_in_a_sentence_or_go_to_dvc():
    wrong = ["", " ", "a.b", "model.x", "..", "~model", "+x", "a\nb", "\0", "other.yaml:a"]
    for key in [*KEYS, *wrong]:
        for value in ("1", "", "[", "{", "{a: 1}", "'", "a\nb", "\0", "$(x)", "x" * 5000):
            for text in (f"{key}={value}", f"{key}", f"{key} = {value}", f"={value}"):
                with contextlib.suppress(ValueError):
                    assert check_override(text, PRESENT) in KEYS
