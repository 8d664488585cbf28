"""How long and how fast to train: the parameters that all training stages share.

Knows no trainer and no loss.
"""

import math
from dataclasses import asdict, dataclass
from typing import ClassVar

WARMUP_SHARE = 0.05  # of all steps


@dataclass(frozen=True, kw_only=True)
class LrScale:
    """Factors on a section's `lr`, by the parameters' group."""

    memory: float  # of feature maps and the like, gates apart
    infini: float  # of the Infini layers' projections


@dataclass(frozen=True, kw_only=True)
class FullLrScale(LrScale):
    """The same where more than Infini layers may train."""

    rest: float  # of everything else that trains


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train: what the sections of all training stages share."""

    section: ClassVar[str]  # the section's name in params.yaml
    least_epochs: ClassVar[int] = 1

    batch_size: int  # samples a step and process
    epochs: int
    lr: float  # peak, of the parameters whose scale is 1
    patience: int  # epochs without a better val_loss before stopping
    min_delta: float  # how much lower a val_loss must be to count as better
    seed: int

    def __post_init__(self) -> None:
        """Refuse values that would only fail, or mislead, an hour later."""
        self.require_at_least(1, "batch_size", "patience")
        self.require_at_least(self.least_epochs, "epochs")
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

    def require_scales(self, scales: LrScale) -> None:
        """Refuse a factor below 0, by name."""
        for name, value in asdict(scales).items():
            if value < 0:
                raise ValueError(f"{self.section}.lr_scale.{name} must be at least 0, got {value}")


def rate_factor(step: int, num_steps: int) -> float:
    """Return the share of the peak learning rate at a step, counted from 0: ramp, then cosine."""
    ramp = (step + 1) / max(1, round(WARMUP_SHARE * num_steps))
    return min(1.0, ramp) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
