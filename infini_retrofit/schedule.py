"""How long and how fast to train: the parameters that all training stages share.

Knows no trainer and no loss.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

WARMUP_SHARE = 0.05  # of all steps


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train: what the sections of all training stages share."""

    section: ClassVar[str]  # the section's name in params.yaml

    batch_size: int  # samples a step and process
    epochs: int
    lr: float  # peak, of the parameters whose scale is 1
    patience: int  # epochs without a better val_loss before stopping
    min_delta: float  # how much lower a val_loss must be to count as better
    seed: int

    def __post_init__(self) -> None:
        """Refuse values that would only fail, or mislead, an hour later."""
        self.require_at_least(1, "batch_size", "epochs", "patience")
        self.require_at_least(0, "min_delta", "seed")
        if self.seed >= 2**32:
            raise ValueError(f"{self.section}.seed must be below 2**32, got {self.seed}")
        if self.lr <= 0:
            raise ValueError(f"{self.section}.lr must be greater than 0, got {self.lr}")

    def require_at_least(self, least: int, *names: str) -> None:
        """Refuse fields that are too small, by name."""
        for name in names:
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{self.section}.{name} must be at least {least}, got {value}")


def rate_factor(step: int, num_steps: int) -> float:
    """Return the share of the peak learning rate at a step, counted from 0: ramp, then cosine."""
    ramp = (step + 1) / max(1, round(WARMUP_SHARE * num_steps))
    return min(1.0, ramp) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
