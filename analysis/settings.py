"""With which parameters experiments ran, those that an older params.yaml lacks filled in.

Knows section `infini` and its defaults; no other, and no metric.
"""

from dataclasses import asdict
from typing import Any

from infini_retrofit.layer.form import InfiniParams
from recipes.experiments import Source, read_params_of
from recipes.overlays import leaves


def read_settings(source: Source) -> dict[str, Any]:
    """Read what an experiment ran with, by dotted name; raises as `read_params_of`.

    Choices of form that an older params.yaml lacks have their defaults.
    """
    params = read_params_of(source)
    form = asdict(InfiniParams()) | params.get("infini", {})
    return dict(leaves({**params, "infini": form}))
