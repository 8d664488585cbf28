"""Whatever is wrong in params.yaml is said by the first stage, which changes nothing then."""

import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages import check_params

ROOT = Path(__file__).parent.parent
OLD = "of an earlier run"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an earlier result."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    check_params.PARAMS_OK.write_text(OLD)
    return tmp_path


def write(**changes: object) -> None:
    """Write the project's own parameters with some changed, or removed where the value is None.

    Keys have `__` for the dot between a section and a key.
    """
    params = YAML(typ="safe").load(ROOT / "params.yaml")
    for name, value in changes.items():
        *sections, key = name.split("__")
        table = params
        for section in sections:
            table = table[section]
        table.pop(key, None)
        if value is not None:
            table[key] = value
    YAML(typ="safe").dump(params, Path("params.yaml"))


def test_the_project_s_own_parameters_pass_and_the_output_is_constant(project):
    write()
    check_params.main()
    first = check_params.PARAMS_OK.read_bytes()
    write(distill__epochs=7)
    check_params.main()
    assert check_params.PARAMS_OK.read_bytes() == first != OLD.encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distil": {}}, r"params\.yaml must .* got unknown \['distil'\], missing \[\]"),
        ({"eval": None}, r"params\.yaml must .* got unknown \[\], missing \['eval'\]"),
        ({"model": "gpt-5"}, r"^model must be one of .*pythia-70m, smollm2-135m .*got 'gpt-5'$"),
        ({"corpus": "books"}, r"^corpus must be one of .*wikipedia-sample.* got 'books'$"),
        ({"launcher": " "}, r"^launcher must be a command such as python, got ' '$"),
        ({"launcher": 3}, r"^launcher must be text, got 3$"),
        ({"models__my-model__source": "zip"}, r"my-model\.source must be one of hub, local, wheel"),
        ({"models__my-model__path": 3}, r"models\.my-model\.path must be text, got 3"),
        ({"corpora__my-texts__val_share": 2.0}, r"corpora\..*val_share must .* got 2\.0"),
        ({"infini__layers": "some"}, r"infini\.layers must be .* got 'some'"),
        ({"infini__layers": [0.5]}, r"infini\.layers must be a list, .* got \[0\.5\]"),
        ({"infini__memory": True}, r"infini\.memory must be one of on, off, got True"),
        ({"infini__local_context": 257}, r"infini\.local_context must be .* got 257"),
        ({"distill__lr": "fast"}, r"distill\.lr must be a finite number, got 'fast'"),
        ({"distill__lr": -1}, r"distill\.lr must be greater than 0, got -1"),
        ({"distill__epochs": 0}, r"distill\.epochs must be at least 1, got 0"),
        ({"distill__epochs": None}, r"distill must .* missing \['epochs'\]"),
        ({"finetune__lr_scale__rest": "x"}, r"finetune\.lr_scale\.rest must be a finite number"),
        ({"finetune__lr_scale__x": 1}, r"finetune\.lr_scale must .* unknown \['x'\]"),
        ({"eval__stride": 513}, r"eval\.stride must be .* got 513"),
        (
            {"longdocs__tokens_per_document": 4000},
            r"^longdocs\.tokens_per_document must be a multiple of infini\.segment_length "
            r"\(256 tokens\), got 4000$",
        ),
        (
            {"distill__tokens_per_sample": 1000},
            r"^distill\.tokens_per_sample must be a multiple of infini\.segment_length "
            r"\(256 tokens\), got 1000$",
        ),
        ({"infini__segment_length": 384}, r"must be a multiple of infini\.segment_length \(384"),
    ],
)
def test_each_mistake_is_named_and_the_earlier_result_stays(project, changes, message):
    write(**changes)
    with pytest.raises(ValueError, match=message):
        check_params.main()
    assert check_params.PARAMS_OK.read_text() == OLD


def test_on_the_command_line_it_is_one_sentence_without_a_traceback(project, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write(distill__epochs=0)
    command = [sys.executable, "-m", "stages.check_params"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "error: distill.epochs must be at least 1, got 0\n"
