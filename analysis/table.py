"""Finished experiments as one Markdown table.

Knows which metrics the stages write; not how experiments are run or found.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from infini_retrofit.pipeline.files import render
from recipes.finished import Finished, Metrics
from recipes.overlays import Settings, differing, literal

MISSING = "-"
PARAMS = "params"  # stands for an experiment's params.yaml where a metric's file does


class Column(NamedTuple):
    """One column: its metric, or the sum of those that are there; `-` if none is."""

    title: str
    metrics: tuple[tuple[str, ...], ...]  # file under metrics/, or PARAMS, then the keys down
    shown: Callable[[Any], str]


def _shown_ppl(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def _ppl(title: str, key: str, model: str = "finetuned") -> Column:
    return Column(title, (("eval_sliding", model, f"{key}_test_ppl"),), _shown_ppl)


def _gain(title: str, over: str) -> Column:
    return Column(title, (("eval_sliding", "finetuned", f"gain_over_{over}"),), "{:+.4f}".format)


SEGMENT = _ppl("segment", "segment")
CONTROL = _ppl("its control", "segment", "control")
GAP = Column("gap_recovered", (("eval_sliding", "finetuned", "gap_recovered"),), "{:.1%}".format)
OVER_CONTROL = _gain("over its control", "control")
BYTES = Column("state_bytes", (("eval_sliding", "finetuned", "state_bytes"),), "{:,}".format)
PROTOCOLS = (
    _ppl("sliding", "sliding"),
    _ppl("full", "full"),
    SEGMENT,
    CONTROL,
    _ppl("memory off", "segment_off"),
    _ppl("memory of one segment", "segment_recent"),
    _ppl("memory swapped", "segment_swapped"),
    _ppl("equal bytes", "segment_kv"),
    _ppl("control, equal bytes", "segment_kv", "control"),
    _ppl("t2", "t2"),
)
GAINS = (
    GAP,
    OVER_CONTROL,
    _gain("over memory off", "off"),
    _gain("over memory of one segment", "recent"),
    _gain("over memory swapped", "swapped"),
    _gain("over equal bytes", "kv"),
    BYTES,
    Column("trainable parameters", (("finetune", "num_trainable_parameters"),), "{:,}".format),
    Column(
        "tokens seen",
        (("distill", "num_trained_tokens"), ("finetune", "num_trained_tokens")),
        "{:,}".format,
    ),
)
LABELS = (
    Column("distillation loss", (("distill", "val_loss"),), "{:.4f}".format),
    _ppl("distilled: sliding", "sliding", "distilled"),
    _ppl("distilled: t2", "t2", "distilled"),
    _ppl("fine-tuned: sliding", "sliding"),
    _ppl("fine-tuned: segment", "segment"),
    _ppl("fine-tuned: t2", "t2"),
    _ppl("control: sliding", "sliding", "control"),
    _ppl("control: t2", "t2", "control"),
    Column("best epoch", (("finetune", "best_epoch"),), "{}".format),
    Column("epochs run", (("finetune", "epochs_run"),), "{}".format),
)
CHOSEN = (SEGMENT, CONTROL, GAP, OVER_CONTROL, BYTES)
MEMORY = PROTOCOLS + GAINS
COLUMNS = {
    "memory": MEMORY,
    "protocols": PROTOCOLS,
    "gains": GAINS,
    "choices": CHOSEN,  # beside the parameters in which the experiments differ
    "labels": LABELS,
}


def markdown(
    experiments: Mapping[str, Finished], names: Sequence[str], columns: Sequence[Column] = MEMORY
) -> str:
    """Lay out a row for each name, in that order; what an experiment lacks is a dash."""
    found = {name: experiments[name].metrics if name in experiments else {} for name in names}
    rows = [[name, *(_cell(metrics, c) for c in columns)] for name, metrics in found.items()]
    return render(["recipe", *(column.title for column in columns)], rows)


def _cell(metrics: Metrics, column: Column) -> str:
    values = [find(metrics, *path) for path in column.metrics]
    there = [value for value in values if value is not None]
    if not there:
        return MISSING
    return column.shown(sum(there) if len(there) > 1 else there[0])


def choices(settings: Mapping[str, Settings]) -> tuple[Column, ...]:
    """Return a column for each parameter in which some experiments differ, then `CHOSEN`.

    Values are written as `-S` takes them, a number in one way alone: 25, not 25.0.
    """
    keys = differing(list(settings.values()))
    return tuple(Column(key, ((PARAMS, key),), _setting) for key in keys) + CHOSEN


def _setting(value: Any) -> str:
    return literal(int(value) if isinstance(value, float) and value.is_integer() else value)


def with_settings(
    experiments: Mapping[str, Finished], settings: Mapping[str, Settings]
) -> dict[str, Finished]:
    """Put the parameters of some experiments beside their metrics, for the columns of `choices`."""
    return {
        name: experiments[name]._replace(
            metrics={**experiments[name].metrics, _path(PARAMS): {"data": own}}
        )
        for name, own in settings.items()
    }


def find(metrics: Metrics, file: str, *keys: str) -> Any:
    """Walk down to a metric; what could not be read has no `data`."""
    value: Any = metrics.get(_path(file), {}).get("data")
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _path(file: str) -> str:
    """Return under which name the metrics of an experiment hold a file."""
    return f"metrics/{file}.json"
