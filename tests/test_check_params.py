"""Stage `check_params` names each mistake in params.yaml and keeps the earlier result."""

import json
from pathlib import Path

import pytest

from infini_retrofit.pipeline.files import write_manifest
from stages import check_params
from tests.tiny import tiny_base_folder
from tests.tiny_project import SMALL, write_params

AS_PUBLISHED = {k.replace(".", "__"): v for k, v in SMALL.items()}
OLD = "of an earlier run"


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an earlier result of the stage."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    check_params.PARAMS_OK.write_text(OLD)
    return tmp_path


def write(**changes: object) -> None:
    """Write the project's own parameters with some changed; `__` stands for a dot."""
    write_params(Path.cwd(), {name.replace("__", "."): value for name, value in changes.items()})


def test_the_project_s_own_parameters_pass_and_the_output_is_constant(earlier):
    write()
    check_params.main()
    first = check_params.PARAMS_OK.read_bytes()
    write(distill__epochs=7)
    check_params.main()
    assert check_params.PARAMS_OK.read_bytes() == first != OLD.encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distil": {}}, r"^distil is unknown$"),
        ({"eval": None}, r"^eval is missing$"),
        ({"model": "gpt-5"}, r"^model must be one of .*pythia-mini.*, smollm2-135m .*got 'gpt-5'$"),
        ({"corpus": "books"}, r"^corpus must be one of .*wikipedia-sample.* got 'books'$"),
        ({"corpus": "passkey"}, r"^corpus must be a key of corpora that holds texts, got passkey"),
        ({"longcontext__lengths": [64]}, r"^longcontext\.lengths\.0 must be .* to 128, got 64$"),
        ({"launcher": " "}, r"^launcher: must be a command such as python, got ' '"),
        ({"launcher": "python; ls"}, r"^launcher: must be .* got 'python; ls': write words"),
        ({"models__my-model__path": " "}, r"^models\.my-model\.path: must be a path, got ' '"),
        ({"models__smollm2-135m__file": "a/../../b"}, r"file: must be a relative path"),
        ({"models__pythia-70m__repo_id": "../x"}, r"repo_id: Repo id must use alphanumeric"),
        ({"finetune__lr": 1e30}, r"^finetune\.lr must be less than or equal to 10, got 1e\+30$"),
        ({"distill__epochs": 10**9}, r"^distill\.epochs must be less than or equal to 1000000, "),
        ({"models__my-model__source": "zip"}, r"my-model\.source must be one of hub, local, scr"),
        ({"corpora__my-texts__val_share": 2.0}, r"corpora\..*val_share must .* got 2\.0"),
        ({"corpora__pg19__revision": "main"}, r"^corpora\.pg19\.revision: must be a commit of 40"),
        ({"longdocs__corpus": "x"}, r"^longdocs\.corpus must be one of .*pg19, .* got 'x'$"),
        ({"longdocs__documents": 1}, r"^longdocs\.documents must be 'all' or .* to 2, got 1$"),
        ({"infini__local_context": -1}, r"infini\.local_context must be .* got -1"),
        ({"distill__lr": -1}, r"distill\.lr must be greater than .*, got -1"),
        ({"finetune__label_shift": 3}, r"finetune\.label_shift must be 1 or 2, got 3"),
        ({"finetune__label_shift": 2, "finetune__kl_weight": 0.5}, r"\.kl_weight must be 0 w"),
        (
            {"finetune_control__lr": 1e-320},
            r"control\.lr must be greater than or equal to 0\.000000000001 or 'same', got 1e-320",
        ),
        (
            {"infini__layers": [], "finetune__trainable": "all"}
            | {"finetune_control__trainable": "infini"},
            r"finetune_control\.trainable must be one of all, attention, lora .* got infini",
        ),
        ({"eval__stride": 513}, r"eval\.stride must be .* got 513"),
        ({"longdocs__tokens_per_document": 4000}, r"document must be a multiple .* got 4000$"),
        ({"longdocs__tokens_per_document": 256}, r"document must be at least 2 segments .* 256$"),
        ({"distill__tokens_per_sample": 1000}, r"sample must be a multiple .* got 1000$"),
        (
            AS_PUBLISHED | {"infini__init": "random_layer"},
            r"^distill\.objective must be layer_output when .* random_layer, .* attention_output$",
        ),
        (
            AS_PUBLISHED | {"infini__insertion": "adapter", "distill__epochs": 1},
            r"^distill\.objective must be layer_output when .* adapter, .* got attention_output$",
        ),
        ({"infini__memory_layers": []}, r"^finetune\.memory_documents must be 0 where .* got 8$"),
        ({"finetune__trainable": "infini"}, r"^finetune\.memory_documents must be 0 where"),
        ({"infini__segment_length": 384}, r"must be a multiple of infini\.segment_length \(384"),
    ],
)
def test_each_mistake_is_named_and_the_earlier_result_stays(earlier, changes, message):
    write(**changes)
    with pytest.raises(ValueError, match=message):
        check_params.main()
    assert check_params.PARAMS_OK.read_text() == OLD


@pytest.mark.parametrize(
    ("changes", "deepest"),
    [
        ({"model": "pythia-mini", "models__pythia-mini__num_layers": 2}, 1),
        ({"model": "my-model", "models__my-model__path": "own-model"}, 2),
    ],
)
def test_a_layer_beyond_a_base_that_is_not_brought_yet_is_refused(earlier, changes, deepest):
    tiny_base_folder(earlier / "own-model")
    write(**changes, infini__layers=[0, deepest])
    check_params.main()
    check_params.PARAMS_OK.write_text(OLD)
    write(**changes, infini__layers=[0, deepest + 1])
    message = rf"^infini\.layers must be in -{deepest + 1}\.\.{deepest} .* got {deepest + 1}$"
    with pytest.raises(ValueError, match=message):
        check_params.main()
    assert check_params.PARAMS_OK.read_text() == OLD


def bring_base(name: str) -> None:
    """Make a base of three layers on disk, as the preset `name` would."""
    tiny_base_folder(check_params.BASE)
    about = check_params.BASE / "base.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"name": name}))
    write_manifest(check_params.BASE)


def test_layers_are_compared_with_the_base_on_disk_only_if_it_stays(earlier):
    bring_base("my-model")
    tiny_base_folder(earlier / "own-model", num_hidden_layers=4)
    write(model="pythia-70m", infini__layers=[3])
    check_params.main()
    write(model="my-model", **{"models__my-model__path": "own-model"}, infini__layers=[3])
    check_params.main()
    for path in (str(check_params.BASE), "my-model"):
        write(model="my-model", **{"models__my-model__path": path}, infini__layers=[3])
        with pytest.raises(ValueError, match=r"infini\.layers must be in -3\.\.2 .* got 3"):
            check_params.main()
    (check_params.BASE / "base.json").write_text("[1")
    check_params.main()
