"""Where and from what a run was made: machine, number type, commit, seconds, parameters.

None of it is a metric: it differs from run to run.
"""

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from infini_retrofit.pipeline.device import pick_device, pick_dtype
from infini_retrofit.pipeline.guard import SECONDS
from infini_retrofit.pipeline.schema import leaves

PARAMS = "params.yaml"
UNKNOWN = "-"


def machine() -> str:
    """Return the processor or GPU of this machine, its cores, system and version of torch."""
    device = pick_device()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {os.cpu_count()} cores"
    return f"{name}; {platform.system()}, Python {platform.python_version()}, torch " + str(
        torch.__version__
    )


def dtype() -> str:
    """Return the number type in which models run here."""
    return str(pick_dtype(pick_device())).removeprefix("torch.")


def commit() -> str:
    """Return the commit of the code, and whether files differ from it; "-" outside of git."""
    short = _git("rev-parse", "--short", "HEAD").strip()
    if not short:
        return UNKNOWN
    code = ("stages", "infini_retrofit", "analysis", "dvc.yaml", PARAMS)
    return short + (" with changes" if _git("status", "--porcelain", "--", *code) else "")


def seconds(stage: str) -> float | None:
    """Return how long a stage took when it last ran here; None: it never did."""
    path = SECONDS / stage
    return float(path.read_text()) if path.is_file() else None


def changed_params(params: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return the parameters that differ from those of the last commit: name, before, now."""
    text = _git("show", f"HEAD:./{PARAMS}")
    return differences(YAML(typ="safe").load(text), params) if text else []


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Return the parameters in which two params.yaml differ: dotted name, before, now."""
    old, new = dict(leaves(before)), dict(leaves(now))
    names = [*old, *(name for name in new if name not in old)]
    pairs = [(name, old.get(name, UNKNOWN), new.get(name, UNKNOWN)) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*words: str) -> str:
    """Return the output of git, or nothing where it fails."""
    process = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    return process.stdout if process.returncode == 0 else ""
