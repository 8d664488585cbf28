"""Section `longcontext` of params.yaml: what is asked of long texts, and of whom.

Knows nothing of how it is asked.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from infini_retrofit.longcontext.scaling import Scaling
from infini_retrofit.pipeline.fields import Count, Weight
from infini_retrofit.texts.prompts import MOST_PAIRS, Haystack

Baseline = Literal["window", "streaming", "equal_bytes"] | Scaling
Length = Annotated[int, Field(ge=128, le=2**24)]  # tokens; a needle has no room in fewer
Segments = Annotated[int, Field(ge=1, le=2**16)]
Pairs = Annotated[int, Field(ge=1, le=MOST_PAIRS)]


@dataclass(frozen=True, kw_only=True)
class LongcontextParams:
    """Section `longcontext` of params.yaml; an empty list leaves a task out."""

    samples: Count  # prompts in each cell
    lengths: list[Length]  # tokens of a prompt with a pass key
    depths: list[Weight]  # shares of the haystack before the pass key
    haystacks: list[Haystack]
    pairs: list[Pairs]  # numbers that a prompt without a haystack stores
    needles: list[Pairs]  # numbers that are spread in a prompt of the shortest of `lengths`
    questions: Count  # at most, about the numbers of a prompt
    compressions: list[Segments]  # between the pass key and its question
    distance: Length  # tokens between them where the segments are cut to give as many
    documents: Count  # longest articles whose loss is plotted by position
    document_tokens: Annotated[list[Length], Field(max_length=1)]  # of each, or none
    baselines: list[Baseline]  # of the base, beside full attention
    window: Annotated[int, Field(ge=16)]  # tokens, of `window` and `streaming`

    def __post_init__(self) -> None:
        """Refuse tasks that would be left out without a word."""
        for task, needed in (
            ("lengths", "depths"),
            ("lengths", "haystacks"),
            ("needles", "haystacks"),
            ("compressions", "haystacks"),
            ("needles", "lengths"),
        ):
            if getattr(self, task) and not getattr(self, needed):
                raise ValueError(
                    f"longcontext.{task} must be [] when longcontext.{needed} is [], "
                    f"got {getattr(self, task)}"
                )
        for name, values in vars(self).items():
            if isinstance(values, list) and len({*values}) < len(values):
                raise ValueError(f"longcontext.{name} must name each value once, got {values}")
