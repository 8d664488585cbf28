"""Stage `report`: the answer of the run in a sentence, a table and a page.

Ends with the table on the terminal. Nothing reads what it writes, so the page may show machine
and seconds.

Reads:  params.yaml (all of it), metrics/*.json, plots/*.tsv, data/*.manifest.json, models,
        data/longdocs, git,
        the seconds that stages noted in .dvc/tmp/seconds
Writes: report/index.html, report/report.md, metrics/summary.json, plots/summary.tsv,
        plots/training.tsv
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from analysis.report import setting
from analysis.report.continuations import (
    Prefix,
    continue_base,
    continue_control,
    continue_retrofit,
    decode,
)
from analysis.report.page import Report, as_html, as_markdown
from analysis.report.results import INPUTS, read_results
from analysis.report.rows import summary_rows
from analysis.report.verdict import summarize
from infini_retrofit.model.base import load_base, load_tokenizer, vocab_size
from infini_retrofit.model.checkpoints import load_retrofit
from infini_retrofit.pipeline.device import pick_device, pick_dtype
from infini_retrofit.pipeline.files import verify_results, write_metrics, write_rows, write_text
from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import load_section
from infini_retrofit.pipeline.tokens import read_documents, read_sources

BASE, CONTROL, FINETUNED = Path("models/base"), Path("models/control"), Path("models/finetuned")
DOCUMENTS, SHOWN_TOKENS = Path("data/longdocs/test.parquet"), 60
PAGE, MARKDOWN = Path("report/index.html"), Path("report/report.md")
METRICS = Path("metrics/summary.json")
SUMMARY, TRAINING = Path("plots/summary.tsv"), Path("plots/training.tsv")
PIPELINE = Path(__file__).parents[1] / "dvc.yaml"


def main() -> str:
    """Run the stage and return what it made."""
    params = load_section(dict, "")
    for stage, files in INPUTS.items():
        verify_results(stage, [Path(file) for file in files])
    results = read_results(lambda path: Path(path).read_text(encoding="utf-8"))
    prefix, continuations = continue_prefix(params)
    report = Report(
        title=f"infini-retrofit: {params['model']} with a memory",
        results=results,
        prefix=prefix,
        continuations=continuations,
        changed=[tuple(map(str, row)) for row in setting.changed_params(params)],
        setting=[
            ("machine", setting.machine()),
            ("number type", setting.dtype()),
            ("commit", setting.commit()),
        ],
        seconds=list(seconds_rows()),
        token_seconds={
            model: found
            for model in results.recall
            if (found := setting.seconds(f"eval_longcontext.{model}")) is not None
        },
    )
    text = as_markdown(report)
    write_metrics(METRICS, summarize(results))
    write_rows(SUMMARY, summary_rows(results))
    write_rows(TRAINING, results.curves.to_dict("records"))
    write_text(PAGE, as_html(report))
    write_text(MARKDOWN, text)
    print("\n" + text.split("\n## ")[0], flush=True)
    return f"report: {PAGE} (open it in a browser), {MARKDOWN}"


def continue_prefix(params: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """Return the end of the prefix, and how each model continues it."""
    documents = read_documents(DOCUMENTS, vocab_size(BASE), params["eval"]["documents"])
    sources = read_sources(DOCUMENTS, len(documents))
    other = next((i for i, source in enumerate(sources) if source != sources[0]), 1)
    prefix = Prefix.of(documents, other, params["infini"]["segment_length"])
    device, dtype = pick_device(), pick_dtype(pick_device())
    found = {"the text itself": prefix.truth[0]}
    base = load_base(BASE, dtype).to(device)
    found["base, sees everything"] = continue_base(base, prefix)
    model, form = load_retrofit(BASE, CONTROL, dtype)
    found["control"] = continue_control(model.to(device), form, prefix)
    model, form = load_retrofit(BASE, FINETUNED, dtype)
    for memory, ids in continue_retrofit(model.to(device), form, prefix).items():
        found[f"memory {memory}"] = ids
    tokenizer = load_tokenizer(BASE)
    shown = decode(tokenizer, prefix.whole[0, -SHOWN_TOKENS:])
    return shown, [(name, decode(tokenizer, ids)) for name, ids in found.items()]


def seconds_rows() -> Iterator[tuple[str, str]]:
    """Yield the name of each stage before this one, and its seconds."""
    for stage in YAML(typ="safe").load(PIPELINE)["stages"]:
        found = setting.seconds(stage)
        if stage != "report":
            yield stage, "-" if found is None else f"{found:.0f}"


if __name__ == "__main__":
    run_stage(main)
