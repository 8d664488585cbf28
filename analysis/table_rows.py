"""What the tables of README.md and docs/ show: which experiments, in which rows.

Numbers stand in results/ alone; see `fill_tables`, which reads them.
"""

SEED_RECIPES = ("v1", "v1-fixed", "v2", "v2-fixed", "two-stage", "two-stage-fixed")  # docs/seeds.md
DROPPED = ("lolcats",)  # of the recipes' budget; their form and recipe are gone from the code
# Of one control and one budget; each differs from another in what README speaks of.
CHOICES = (
    *("infini-all-delta", "infini-all", "infini-all-gamma", "infini-all-forgetting"),
    *("memory-and-attention-no-forgetting", "memory-and-attention-gamma"),
    *("memory-and-attention-one-rate", "memory-and-attention-head-gate", "memory-and-attention"),
)
# An experiment, one of its models, and the protocol under which it is shown; None: not run.
Shown = tuple[str, str, str] | None
WON: tuple[tuple[str, Shown, Shown], ...] = (  # the base left as it is; its attention trained
    (
        "nothing crosses a border (the base; the control)",
        ("memory-only", "base", "segment"),
        ("memory-and-attention", "control", "segment"),
    ),
    (
        "Infini-attention as published, memory of 65 tokens' bytes (recipe `infini-all`)",
        None,
        ("infini-all", "finetuned", "segment"),
    ),
    (
        "the same, by the delta rule with ARMT's normaliser (recipe `infini-all-gamma`)",
        None,
        ("infini-all-gamma", "finetuned", "segment"),
    ),
    (
        "a memory of 8.1 tokens' bytes (recipes `memory-only`, `memory-and-attention`)",
        ("memory-only", "finetuned", "segment"),
        ("memory-and-attention", "finetuned", "segment"),
    ),
    (
        "the same, reading only what the segment just before wrote",
        ("memory-only", "finetuned", "segment_recent"),
        ("memory-and-attention", "finetuned", "segment_recent"),
    ),
    (
        "the same, reading another document's memory",
        ("memory-only", "finetuned", "segment_swapped"),
        ("memory-and-attention", "finetuned", "segment_swapped"),
    ),
    (
        "keys and values of 9 tokens",
        ("memory-only", "base", "segment_kv"),
        ("memory-and-attention", "control", "segment_kv"),
    ),
    (
        "keys and values of 64 tokens",
        ("memory-and-context", "finetuned", "segment_off"),
        ("memory-and-context", "control", "segment"),
    ),
    (
        "keys and values of 64 tokens, and the memory in float32 (recipe `memory-and-context`; "
        "right: `mca-4e-4` in `results/`)",
        ("memory-and-context", "finetuned", "segment"),
        ("mca-4e-4", "finetuned", "segment"),
    ),
    (
        "the same, reading another document's memory",
        ("memory-and-context", "finetuned", "segment_swapped"),
        ("mca-4e-4", "finetuned", "segment_swapped"),
    ),
    (
        "keys and values of 73 tokens: the bytes of 64 and of that memory in float32",
        ("memory-and-context", "base", "segment_kv"),
        ("mca-4e-4", "control", "segment_kv"),
    ),
    (
        "keys and values of 64 tokens, and the memory in 16 bits (recipe "
        "`memory-context-attention`)",
        None,
        ("memory-context-attention", "finetuned", "segment"),
    ),
    (
        "the same, reading another document's memory",
        None,
        ("memory-context-attention", "finetuned", "segment_swapped"),
    ),
    (
        "keys and values of 69 tokens: the bytes of 64 and of the memory in 16 bits (right: "
        "`control-69-tokens` in `results/`, trained with all of them)",
        ("memory-context-attention", "base", "segment_kv"),
        ("control-69-tokens", "finetuned", "segment"),
    ),
    (
        "full attention over the document",
        ("memory-only", "base", "full"),
        ("memory-and-attention", "control", "full"),
    ),
)
BEST = "memory-and-attention"
WITHOUT = (  # one choice of BEST, what stands in its place, and the experiment that has that
    (
        "each feature forgets at a learned rate (`decay: feature`)",
        "nothing is forgotten",
        "memory-and-attention-no-forgetting",
    ),
    ("the same", "ARMT's delta rule, which takes no decay", "memory-and-attention-gamma"),
    (
        "8 learned features a head (`feature_map: hedgehog`)",
        "64 fixed ones, eight times the bytes",
        "infini-all-forgetting",
    ),
    (
        "they and the gate's queries learn at 25 times the attention's rate",
        "at that rate",
        "memory-and-attention-one-rate",
    ),
    (
        "the query moves the gate (`gate: query`)",
        "one share a head",
        "memory-and-attention-head-gate",
    ),
)
