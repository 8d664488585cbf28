"""Stage `eval_longcontext`: recall and loss in long texts, beside what a memory must beat.

Reads:  params.yaml (longcontext, infini), models, data/wikitext/test.parquet
Writes: metrics/eval_longcontext.json, plots/longcontext_passkey.tsv, plots/longcontext_recall.tsv,
        plots/longcontext_positions.tsv, data/longcontext.jsonl,
        data/eval_longcontext.manifest.json
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch

from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.longcontext.cells import (
    Cells,
    check_prompts,
    grid_rows,
    longest,
    metrics_of,
    plan,
    position_rows,
    recall_rows,
    run_cells,
)
from infini_retrofit.longcontext.params import LongcontextParams
from infini_retrofit.longcontext.readers import (
    NUM_SINKS,
    Reader,
    carrying_reader,
    full_reader,
    infini_reader,
    scaled_reader,
    window_reader,
)
from infini_retrofit.longcontext.scaling import Scaling, check_plain_rope
from infini_retrofit.model.base import load_base, vocab_size
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.model.retrofit import attention_shapes, branch_token_bytes, state_bytes
from infini_retrofit.pipeline.device import start_run
from infini_retrofit.pipeline.files import seal_results, verify_manifest, write_metrics, write_rows
from infini_retrofit.pipeline.guard import note_seconds, run_stage, training_run
from infini_retrofit.pipeline.params import load_section
from infini_retrofit.pipeline.tables import TokenIds, read_token_rows
from infini_retrofit.texts.prompts import PromptMaker
from infini_retrofit.texts.splits import open_tokenizer

BASE, RETROFITS = Path("models/base"), [Path("models/control"), Path("models/finetuned")]
TEST_TEXT, CELLS = Path("data/wikitext/test.parquet"), Path("data/longcontext.jsonl")
METRICS, GRID = Path("metrics/eval_longcontext.json"), Path("plots/longcontext_passkey.tsv")
RECALL, POSITIONS = Path("plots/longcontext_recall.tsv"), Path("plots/longcontext_positions.tsv")


def main() -> str:
    """Run the stage and return what it made."""
    params = load_section(LongcontextParams, "longcontext")
    infini = load_section(InfiniParams, "infini")
    articles = read_token_rows(TEST_TEXT, vocab_size(BASE))
    documents = longest_documents(articles, params)
    maker = PromptMaker(open_tokenizer(BASE / "tokenizer.json"), articles, "test")
    segment_length = infini.segment_length if infini.has_memory else None
    check_prompts(params, segment_length, infini.local_context, maker)
    for folder in RETROFITS:
        verify_manifest(folder)
    device, dtype = start_run()
    with training_run("eval_longcontext") as folder:
        kept, results = Cells(folder / CELLS.name), []
        for reader in readers(params, infini, longest(params, maker), device, dtype):
            cells = plan(params, reader, maker)
            seconds = run_cells(cells, params, reader, maker, documents, kept)
            if seconds is not None:
                note_seconds(f"eval_longcontext.{reader.name}", seconds)
            results += [kept.found[cell] for cell in cells]
        CELLS.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept.path, CELLS)
    names = dict.fromkeys(r.model for r in results)
    write_metrics(METRICS, {n: metrics_of([r for r in results if r.model == n]) for n in names})
    columns = ("model", "haystack", "tokens", "depth", "accuracy", "greedy", "num_asked")
    write_rows(GRID, grid_rows(results), columns)
    columns = ("model", "task", "number", "tokens", "accuracy", "greedy", "num_asked", "num_bytes")
    write_rows(RECALL, recall_rows(results), columns)
    columns = ("model", "position", "nll", "num_scored", "num_bytes")
    write_rows(POSITIONS, position_rows(results), columns)
    seal_results("eval_longcontext", [METRICS, GRID, RECALL, POSITIONS])
    return f"eval_longcontext: {len(results):,} cells of {', '.join(names)}"


def longest_documents(articles: list[TokenIds], params: LongcontextParams) -> list[torch.Tensor]:
    """Return the longest articles, the longest first."""
    in_order = sorted(articles, key=len, reverse=True)[: params.documents]
    for tokens in params.document_tokens:
        if len(in_order) < params.documents:
            raise ValueError(
                f"longcontext.documents must be at most {len(in_order)}, the articles of "
                f"{TEST_TEXT}, got {params.documents}"
            )
        if len(in_order[-1]) < tokens:
            raise ValueError(
                f"longcontext.document_tokens must be at most {len(in_order[-1])}, the length of "
                f"article {len(in_order)} of the longest in {TEST_TEXT}, got {tokens} for "
                f"{params.documents} documents"
            )
    return [torch.from_numpy(ids).long() for ids in in_order]


def readers(
    params: LongcontextParams,
    infini: InfiniParams,
    num_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Reader]:
    """Yield the base, its baselines, the control and the finetuned, one after another.

    Rotations are scaled to texts of `num_tokens`.
    """
    base = load_base(BASE, dtype).to(device)
    if set(params.baselines) & set(get_args(Scaling)):
        check_plain_rope(base)
    yield full_reader("base", base)
    for name in params.baselines:
        if name == "window":
            yield window_reader(name, base, 0, params.window)
        elif name == "streaming":
            yield window_reader(name, base, NUM_SINKS, params.window)
        elif name == "equal_bytes":
            token_bytes = sum(x.context_token_bytes() for x in attention_shapes(base))
            kept = state_bytes(base, infini)
            kept += infini.segment_length * branch_token_bytes(base, infini)
            yield carrying_reader(name, base, infini.segment_length, -(-kept // token_bytes))
        else:
            yield scaled_reader(base, name, num_tokens)
    del base
    for folder in RETROFITS:
        model, form = load_retrofit(BASE, folder, dtype)
        yield infini_reader(folder.name, model.to(device), form)


if __name__ == "__main__":
    run_stage(main)
