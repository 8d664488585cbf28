"""With which parameters experiments ran, those that an older params.yaml lacks filled in.

Knows section `infini` and its defaults; no other, and no metric.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from infini_retrofit.infini_params import InfiniParams
from recipes.experiments import Source, read_params_of
from recipes.overlays import leaves


def read_settings(source: Source) -> dict[str, Any]:
    """Read what an experiment ran with; raises as `read_params_of`."""
    return settings_of(read_params_of(source))


def settings_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten params.yaml; choices of form that an older one lacks have their defaults."""
    form = asdict(InfiniParams()) | params.get("infini", {})
    return dict(leaves({**params, "infini": form}))
