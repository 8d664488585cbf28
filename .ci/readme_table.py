"""Write the results' table into README.md, from the committed metrics.

Run `python .ci/readme_table.py` in the top folder after the metrics have changed.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from infini_retrofit.table import render

BEGIN, END = "<!-- results -->", "<!-- /results -->"
MODELS = ("base", "control", "distilled", "finetuned")
PROTOCOLS = (
    "sliding_test_ppl",
    "full_test_ppl",
    "segment_test_ppl",
    "segment_off_test_ppl",
    "segment_swapped_test_ppl",
    "segment_kv_test_ppl",
    "t2_test_ppl",
)
OTHERS = (
    *("unigram_test_ppl", "gap_test_nats", "gap_recovered", "state_bytes"),
    *("num_documents", "num_articles"),
)


def table(metrics: dict[str, dict[str, float]]) -> str:
    """Lay out the numbers of eval_sliding.json: a column a model, a row a metric."""
    keys = PROTOCOLS + OTHERS
    rows = [[f"`{key}`", *(shown(metrics[m].get(key)) for m in MODELS)] for key in keys]
    return render(["metric", *MODELS], rows)


def shown(value: float | None) -> str:
    """Write a number with the digits that two machines agree on."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


def fill(text: str, metrics: dict[str, dict[str, float]]) -> str:
    """Replace what stands between the markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(metrics)}\n{END}{after}"


def main() -> None:
    """Rewrite README.md in place."""
    readme = Path("README.md")
    metrics = json.loads(Path("metrics/eval_sliding.json").read_text())
    readme.write_text(fill(readme.read_text(), metrics))


if __name__ == "__main__":
    main()
