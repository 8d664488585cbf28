"""Compare the results of a run with the committed ones; used by .ci/run.

Trained numbers differ a little between machines: their tolerances stand below. What a run was
made from must not differ at all: parameters, sources and untrained data of dvc.lock.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

PPL_RATIO = 1.02
T2_RATIO = 1.5  # the doubly shifted score is large and unsteady
GAP_DIFFERENCE = 0.02
GAIN_DIFFERENCE = 0.02  # nats a token
UNTRAINED = ("check_params", "prepare_")  # stages whose outputs are equal on every machine


def main() -> None:
    """Print every fault and exit with 1 if there is one.

    Arguments: the folder with the committed metrics/ and dvc.lock, then the project's folder.
    """
    committed, checkout = map(Path, sys.argv[1:])
    faults = [*metrics_faults(committed, checkout), *lock_faults(committed, checkout)]
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{len(faults)} differences between this run and the committed results")
    sys.exit(1 if faults else 0)


def metrics_faults(committed: Path, checkout: Path) -> Iterator[str]:
    """Yield what is wrong with the metrics of a run, one line each."""
    before, now = read_metrics(committed), read_metrics(checkout)
    if not before:
        yield "metrics: none are committed"
    for key in sorted(before.keys() ^ now.keys()):
        yield f"{key}: " + ("not measured by this run" if key in before else "not committed")
    for key in sorted(before.keys() & now.keys()):
        if not agree(key, before[key], now[key]):
            yield f"{key}: committed {before[key]}, now {now[key]}"


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read all metrics below a folder as {file: key.key: value}."""
    files = sorted((folder / "metrics").glob("*.json"))
    return {k: v for file in files for k, v in flatten(json.loads(file.read_text()), file.name)}


def flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested metrics, their keys joined by dots."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{name}.{key}")
    else:
        yield name, value


def agree(key: str, before: Any, now: Any) -> bool:
    """Tell whether two values of a metric are as near as that metric must be."""
    if not all(type(value) in (int, float) and math.isfinite(value) for value in (before, now)):
        return False
    leaf = key.split(".")[-1]
    if leaf.endswith("_ppl"):
        ratio = T2_RATIO if leaf.startswith("t2_") else PPL_RATIO
        return 0 < before <= now * ratio and 0 < now <= before * ratio
    if leaf.startswith(("gain_over_", "gap_test_nats")):
        return abs(now - before) <= GAIN_DIFFERENCE
    return leaf != "gap_recovered" or abs(now - before) <= GAP_DIFFERENCE


def lock_faults(committed: Path, checkout: Path) -> Iterator[str]:
    """Yield where the committed dvc.lock was made from something else than the checkout."""
    params = YAML(typ="safe").load(checkout / "params.yaml")
    before, now = (read_lock(folder) for folder in (committed, checkout))
    for stage in sorted(before.keys() ^ now.keys()):
        yield f"dvc.lock: {stage} is {'no stage' if stage in before else 'not committed'}"
    for stage in sorted(before.keys() & now.keys()):
        old, new = before[stage], now[stage]
        yield from (f"dvc.lock: {stage}: {fault}" for fault in entry_faults(stage, old, new))
        yield from (f"dvc.lock: {stage}: {fault}" for fault in params_faults(old, params))
        yield from (f"dvc.lock: {stage}: {fault}" for fault in source_faults(old, checkout))


def read_lock(folder: Path) -> dict[str, Any]:
    """Read the stages of a dvc.lock."""
    return YAML(typ="safe").load(folder / "dvc.lock")["stages"]


def entry_faults(stage: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Compare commands, names of dependencies and parameters, and untrained outputs."""
    if old["cmd"] != new["cmd"]:
        yield f"the command was {old['cmd']!r}, now {new['cmd']!r}"
    if set(hashes(old, "deps")) != set(hashes(new, "deps")):
        yield f"other dependencies: {sorted(hashes(old, 'deps').keys() ^ hashes(new, 'deps'))}"
    if recorded_params(old).keys() != recorded_params(new).keys():
        yield f"other parameters: {sorted(recorded_params(old).keys() ^ recorded_params(new))}"
    if stage.startswith(UNTRAINED) and hashes(old, "outs") != hashes(new, "outs"):
        yield "other outputs, though nothing in them is trained"


def params_faults(entry: dict[str, Any], params: Any) -> Iterator[str]:
    """Compare the recorded parameters with params.yaml."""
    for name, value in recorded_params(entry).items():
        current = params
        for key in name.split("."):
            current = current.get(key) if isinstance(current, dict) else None
        if current != value:
            yield f"{name} was {value}, now {current}"


def source_faults(entry: dict[str, Any], checkout: Path) -> Iterator[str]:
    """Compare the recorded Python files with those of the checkout."""
    for name, digest in hashes(entry, "deps").items():
        if name.endswith(".py"):
            file = checkout / name
            if not file.is_file() or hashlib.md5(file.read_bytes()).hexdigest() != digest:
                yield f"{name} is not the file that was run"


def hashes(entry: dict[str, Any], kind: str) -> dict[str, str]:
    """Return the hash of every dependency or output of a stage."""
    return {item["path"]: item["md5"] for item in entry.get(kind, [])}


def recorded_params(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a stage by name."""
    return entry.get("params", {}).get("params.yaml", {})


if __name__ == "__main__":
    main()
