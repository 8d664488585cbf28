"""A recipe's stages one after another without DVC: for a lent machine that has none.

They run in a copy of the project, and their small files come back. Knows no recipe and no stage.
"""

import copy
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ruamel.yaml import YAML

from infini_retrofit.pipeline.params import PARAMS_PATH
from recipes.kept import METRICS, PIPELINE, REPORT

NEEDED = ("infini_retrofit", "stages", "analysis", "recipes")
BROUGHT_BACK = (METRICS, "plots", REPORT, PARAMS_PATH.name)


def run_without_dvc(params: Mapping[str, Any], folder: Path) -> None:
    """Run every stage, and write metrics, plots, report and params.yaml to a folder.

    Raises:
        ValueError: if a stage fails; nothing is written then.
    """
    with TemporaryDirectory() as name:
        place = Path(name)
        for part in NEEDED:
            shutil.copytree(part, place / part)
        shutil.copy(PIPELINE, place)
        YAML(typ="safe").dump(dict(params), place / PARAMS_PATH.name)
        for stage, command in commands(params).items():
            begin = time.monotonic()
            if subprocess.run(command, cwd=place, check=False).returncode:
                raise ValueError(f"stage {stage} failed: see above")
            print(f"{stage}: {time.monotonic() - begin:.0f} s", flush=True)
        for part in BROUGHT_BACK:
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            if (place / part).is_dir():
                shutil.copytree(place / part, folder / part, dirs_exist_ok=True)
            else:
                shutil.copy(place / part, folder / part)


def commands(params: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the command of each stage, in the order of dvc.yaml, which is that of their needs."""
    stages = YAML(typ="safe").load(Path(PIPELINE))["stages"]
    found = {}
    for name, stage in stages.items():
        first, *rest = stage["cmd"].replace("${launcher}", params["launcher"]).split()
        found[name] = [sys.executable if first == "python" else first, *rest]
    return found


def with_overrides(params: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return parameters changed by `key=value` as of `-S`, of keys that exist."""
    changed = copy.deepcopy(dict(params))
    for setting in settings:
        name, _, value = setting.partition("=")
        *sections, key = name.split(".")
        section = changed
        for part in sections:
            section = section[part]
        section[key] = YAML(typ="safe").load(value)
    return changed
