"""What a user of the library alone meets: public names, few dependencies, an example that runs."""

import importlib
import re
import tomllib

from packaging.requirements import Requirement

import infini_retrofit
from tests.tiny import tiny_base_folder
from tests.tiny_checkout import python
from tests.tiny_project import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGE = ROOT / "infini_retrofit"
LIGHT = {"torch", "transformers", "safetensors", "jaxtyping", "pydantic"}
# Not a pipeline's name, but what its packages bring.
HEAVY = ("datasets", "peft", "dvc", "accelerate", "pyarrow", "gensim", "gguf", "ruamel")


def names_of(requirements: list[str]) -> set[str]:
    return {Requirement(line).name.lower().replace("_", "-") for line in requirements}


def run(program: str) -> str:
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_asks_for_five_packages_and_leaves_the_rest_to_extras():
    assert names_of(PROJECT["dependencies"]) == LIGHT
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"pipeline", "eval", "test"}
    pinned = [
        line
        for file in ("requirements.txt", "requirements-dev.txt")
        for line in (ROOT / file).read_text().splitlines()
        if line and not line.startswith(("#", "-r"))
    ]
    assert names_of(pinned) == LIGHT.union(*(names_of(extra) for extra in extras.values()))


def test_importing_the_package_imports_nothing_else():
    program = "import sys; before = set(sys.modules); import infini_retrofit; "
    program += "print(*(set(sys.modules) - before))"
    loaded = set(run(program).split())
    assert "infini_retrofit" in loaded
    assert {name.split(".")[0] for name in loaded} & LIGHT == set()


def test_all_public_names_come_without_what_the_pipeline_needs():
    program = f"import sys\nfor name in {HEAVY}: sys.modules[name] = None\n"
    program += "import infini_retrofit\nfor name in infini_retrofit.__all__: "
    program += "print(name, getattr(infini_retrofit, name).__name__)\n"
    program += "try: import infini_retrofit.training.loop\n"
    program += "except ImportError as error: print('blocked', error.name)"
    pairs = [line.split() for line in run(program).splitlines()]
    assert pairs.pop() == ["blocked", "accelerate.utils"]
    assert [name for name, _ in pairs] == infini_retrofit.__all__
    assert all(name == found for name, found in pairs)


def test_public_names_stand_in_one_place_and_nothing_private_is_among_them():
    stub = (PACKAGE / "__init__.pyi").read_text()
    lines = re.findall(r"^from \.([\w.]+) import (\w+) as (\w+)$", stub, re.MULTILINE)
    assert len(lines) == len(stub.splitlines())
    assert sorted(name for _, name, _ in lines) == infini_retrofit.__all__
    assert all(name == again and not name.startswith("_") for _, name, again in lines)
    assert set(infini_retrofit.__all__) <= set(dir(infini_retrofit))
    for module, name, _ in lines:
        found = getattr(importlib.import_module(f"infini_retrofit.{module}"), name)
        assert getattr(infini_retrofit, name) is found
        assert found.__module__ == f"infini_retrofit.{module}"


def test_the_readme_s_example_runs(tmp_path, monkeypatch, capsys):
    section = (ROOT / "README.md").read_text().split("\nAs a library")[1]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    tiny_base_folder(tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "True" in said
    assert (tmp_path / "my-retrofit" / "infini_config.json").is_file()
