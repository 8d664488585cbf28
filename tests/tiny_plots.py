"""Made-up rows of plots that have a template, laid out as the stages lay theirs out."""

from collections.abc import Sequence
from typing import Any

import torch

from infini_retrofit.evaluation.evaluation import (
    PROTOCOLS,
    Evaluation,
    rows_of_documents,
    rows_of_positions,
)
from infini_retrofit.evaluation.protocols import share_histogram
from infini_retrofit.layer.state import MemoryReading
from infini_retrofit.training.trainee import memory_history
from stages import control_eval, eval_sliding

NUM_DOCUMENTS, SEGMENT, NUM_BINS = 3, 8, 20
TITLES = ["a", "b", "a"]
OFF_THE_PAGE = 9.0  # nats, of the doubly shifted score

Row = dict[str, Any]


def evaluation(seed: int, protocols: Sequence[str]) -> Evaluation:
    """Make scores of documents that differ from one another under every protocol."""
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_DOCUMENTS, 3 * SEGMENT - 1)
    nlls = {name: 3 + torch.rand(shape, generator=generator) for name in protocols}
    nlls["t2"] += OFF_THE_PAGE
    return Evaluation({}, nlls)


SCORED = dict.fromkeys(("base", "control", "distilled", "finetuned"), PROTOCOLS)
SCORED["distilled"] = eval_sliding.PROTOCOLS_OF[eval_sliding.DISTILLED]
MODELS = {name: evaluation(i, SCORED[name]) for i, name in enumerate(SCORED)}
PERPLEXITIES = {f"{name}_test_ppl": 34.567 for name in (*PROTOCOLS, "sliding", "unigram")}
PERPLEXITIES["t2_test_ppl"] = 20345.6
BY_POSITION = {
    "base": ("segment",),
    "control": control_eval.POSITION_PROTOCOLS,
    "finetuned": eval_sliding.POSITION_PROTOCOLS,
}


def position_rows(*names: str) -> list[Row]:
    return [
        row
        for name in names
        for row in rows_of_positions(name, MODELS[name], SEGMENT, BY_POSITION[name])
    ]


def memory_rows() -> list[Row]:
    shares = {"memory_share_mean": 0.11, "memory_share_p05": 0.01, "memory_share_p50": 0.1}
    used = shares | {"memory_share_p95": 0.3, "recalled_over_local": 0.5}
    used |= {"segment_val_ppl": 41.0, "segment_off_val_ppl": 42.0}
    logged = {f"eval_{name}": value for name, value in used.items()}
    return memory_history([{"epoch": e, "eval_val_loss": 1.0} | logged for e in (0, 1, 2)])


def share_rows() -> list[Row]:
    share = torch.linspace(0, 0.52, 60).reshape(1, 3, 4, 5)
    return share_histogram({i: MemoryReading(share, share, share) for i in (2, 10)}, NUM_BINS)


ROWS: dict[str, list[Row]] = {
    "plots/baseline_documents.tsv": rows_of_documents("base", MODELS["base"], TITLES),
    "plots/baseline_positions.tsv": position_rows("base"),
    "plots/control_documents.tsv": rows_of_documents("control", MODELS["control"], TITLES),
    "plots/control_positions.tsv": position_rows("control"),
    "plots/distill_memory.tsv": memory_rows(),
    "plots/finetune_memory.tsv": memory_rows(),
    "plots/eval_sliding.tsv": [
        row for name in MODELS for row in eval_sliding.rows_of_ppl(name, PERPLEXITIES)
    ],
    "plots/eval_documents.tsv": [
        row for name, e in MODELS.items() for row in rows_of_documents(name, e, TITLES)
    ],
    "plots/eval_positions.tsv": position_rows("base", "control", "finetuned"),
    "plots/memory_share.tsv": share_rows(),
}
