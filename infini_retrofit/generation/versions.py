"""Which versions of `transformers` generate with a memory, and what they call a cache.

Importing this refuses older ones. Knows nothing of memory.
"""

from dataclasses import fields

import transformers
from transformers.modeling_outputs import BaseModelOutputWithPast

# Exported models generate the same tokens with these: `.ci/check_export.py` opens one with both.
PROVEN = ("5.23.0", "5.24.0")
# The argument and the output that hold a cache, in all models of one version; from 5.24 `cache`.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next((x.name for x in fields(BaseModelOutputWithPast) if x.name in CACHE_NAMES), "")


def unproven(fault: str) -> str:
    """Return a sentence about a version of `transformers` with which generation would be wrong."""
    return (
        f"transformers {transformers.__version__} {fault}: run `pip install "
        f"transformers=={PROVEN[-1]}` (a memory was proven with {' and '.join(PROVEN)})"
    )


if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
    raise ImportError(unproven("is too old"))
if not CACHE:
    raise ImportError(unproven("has another name for caches"))
