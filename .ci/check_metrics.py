"""Compare the results of a run with the committed ones; used by .ci/run.

Trained numbers depend a little on the processor and its number type: the table says how much.
What a run was made from must be equal: commands, parameters, code and untrained data of dvc.lock.
DVC wrote the lock at the end of the run; `dvc status` proves that it still describes the files.
"""

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from ruamel.yaml import YAML

MARGIN = 8  # allowed: so many times the largest difference seen, for processors not measured
# The largest differences between the committed run, of bfloat16 products, and one in float32.
# Perplexities are compared by their logarithms, all else as it stands. The first pattern that
# matches a metric counts; a metric without a pattern must be equal. Of `finetuned` the validation
# was compared: it stands for the test.
DIFFERENCES = [
    # metrics                                                   float32  if broken
    # The number type moves a few of the tokens that a threshold chooses.
    (r".*num_key_tokens", 10),  # of 1,951
    (r"eval_longcontext\..*_(accuracy|greedy|worst_cell)", 0.125),  # any: few prompts are asked
    (r"eval_longcontext\..*_nll", 0.0012),  # labels off: 7.1
    (r".*key_token_nll_\w+", 0.0231),  # memory not read: 0.45
    (r"(baseline_eval|\w+\.base)\.(?!t2|unigram)\w+_(ppl|nll)", 0.0006),  # labels off: 7.1
    (r"eval_sliding\.finetuned\.t2_test_ppl", 0.0099),  # one shift: 6.8
    (r".*t2_test_ppl", 0.0033),  # one shift: 6.9
    (r"(finetune_control|.*control\w*)\.\w+_(ppl|nll|loss)", 0.0013),  # untrained: 0.068
    (r".*gap_test_nats", 0.0003),  # no border: 0.12
    (r"distill\.val_loss", 0.0039),  # another objective, another scale
    (r"distill\.\w+_ppl", 0.0006),  # labels off: 7.1
    (r"distill\.(memory_share|recalled)\w+", 0.0001),  # another start: 0.28
    (r"(finetune|.*finetuned)\.\w+_(ppl|nll|loss)", 0.0017),  # the base: 0.087
    (r"finetune\.memory_share\w+", 0.0016),  # gates never moved: 0.031
    (r".*finetuned\.gain_over_\w+", 0.0010),  # memory not read: 0.022
    (r".*finetuned\.gap_recovered", 0.0080),  # no control: 0.17
]
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
    for name in sorted(before.keys() ^ now.keys()):
        yield f"{name}: " + ("not measured by this run" if name in before else "not committed")
    for name in sorted(before.keys() & now.keys()):
        if not agree(name, before[name], now[name]):
            yield f"{name}: committed {before[name]}, now {now[name]}"


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read all metrics below a folder as {stage.key.key: value}, but those made of others."""
    paths = [path for path in folder.glob("metrics/*.json") if path.stem != "summary"]
    files = {path.stem: json.loads(path.read_text()) for path in paths}
    return pd.json_normalize(files).to_dict("records")[0] if files else {}


def agree(name: str, before: Any, now: Any) -> bool:
    """Return whether two values of a metric are as near as that metric must be."""
    if not all(type(value) in (int, float) and math.isfinite(value) for value in (before, now)):
        return False
    allowed = tolerance(name)
    if not allowed:
        return math.isclose(before, now)
    if name.endswith("_ppl"):
        return min(before, now) > 0 and abs(math.log(now / before)) <= allowed
    return abs(now - before) <= allowed


def tolerance(name: str) -> float:
    """Return how far a metric may be from the committed one; 0 for metrics that must be equal."""
    seen = (largest for pattern, largest in DIFFERENCES if re.fullmatch(pattern, name))
    return MARGIN * next(seen, 0.0)


def lock_faults(committed: Path, checkout: Path) -> Iterator[str]:
    """Yield what the two dvc.lock record differently, but for what is trained."""
    before, now = (YAML(typ="safe").load(f / "dvc.lock")["stages"] for f in (committed, checkout))
    trained = {
        out["path"]
        for stage, entry in [*before.items(), *now.items()]
        if not stage.startswith(UNTRAINED)
        for out in entry.get("outs", [])
    }
    for stage in sorted(before.keys() | now.keys()):
        old, new = (recorded(lock.get(stage, {}), trained) for lock in (before, now))
        for name in sorted(old.keys() | new.keys()):
            was, is_now = old.get(name, "absent"), new.get(name, "absent")
            if was != is_now:
                yield f"dvc.lock: {stage}: {name} was {was}, now {is_now}"


def recorded(entry: dict[str, Any], trained: set[str]) -> dict[str, Any]:
    """Return a stage's command, parameters, dependencies and outputs by name."""
    files = [*entry.get("deps", []), *entry.get("outs", [])]
    hashes = {f["path"]: "trained" if f["path"] in trained else f["md5"] for f in files}
    params = entry.get("params", {}).get("params.yaml", {})
    command = {"cmd": entry["cmd"]} if entry else {}
    return command | {f"parameter {name}": v for name, v in params.items()} | hashes


if __name__ == "__main__":
    main()
