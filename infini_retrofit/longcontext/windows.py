"""A cache of a window: the last tokens' keys and values, and those of the first few (sinks).

Knows nothing of models but their rotations.

Source: Xiao et al. 2023, arXiv:2309.17453 (StreamingLLM).

Differs from the paper: tokens leave when the next piece of text is read, not one by one.

Axes:
    B  row of the batch
    N  key/value head
    C  token
    K  channel of a head
"""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from infini_retrofit.layer.cut import rotate
from infini_retrofit.model.retrofit import attention_shapes


class WindowLayer(DynamicLayer):
    """The keys and values that one layer keeps.

    Sinks are rotated to stand just before the window: the distances stay those of a text of
    `num_sinks + window` tokens. `inv_freq` are the model's, or None in a layer without rotations.
    """

    is_croppable = False

    def __init__(self, num_sinks: int, window: int, inv_freq: Float[Tensor, "_"] | None) -> None:
        super().__init__()
        self.num_sinks, self.window, self.inv_freq = num_sinks, window, inv_freq
        self.num_seen = 0

    def update(
        self, key_states: Float[Tensor, "B N _ K"], value_states: Float[Tensor, "B N _ K"], *_, **__
    ) -> tuple[Float[Tensor, "B N C K"], Float[Tensor, "B N C K"]]:
        """Add a piece of text; return what its queries may see."""
        keys, values = super().update(key_states, value_states)
        self.num_seen += key_states.shape[-2]
        num_left = self.num_seen - keys.shape[-2]
        sinks, recent = keys.split([self.num_sinks, keys.shape[-2] - self.num_sinks], dim=-2)
        if num_left and self.num_sinks and self.inv_freq is not None:
            angles = (num_left * self.inv_freq).repeat(2)
            keys = torch.cat([rotate(sinks, angles.cos(), angles.sin()), recent], dim=-2)
        if recent.shape[-2] > self.window:
            rest = values[..., self.num_sinks :, :][..., -self.window :, :]
            self.keys = torch.cat([sinks, recent[..., -self.window :, :]], dim=-2)
            self.values = torch.cat([values[..., : self.num_sinks, :], rest], dim=-2)
        return keys, values

    def get_seq_length(self) -> int:
        """Return the number of tokens read, which is the next one's position."""
        return self.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys, and how many tokens have left."""
        num_kept = self.keys.shape[-2] if self.is_initialized else 0
        return num_kept + query_length, self.num_seen - num_kept


def window_cache(model: PreTrainedModel, num_sinks: int, window: int) -> Cache:
    """Return an empty cache of a base; its first piece of text must hold all the sinks."""
    inv_freq = model.base_model.rotary_emb.inv_freq
    tables = [inv_freq if shape.rotates else None for shape in attention_shapes(model)]
    return Cache(layers=[WindowLayer(num_sinks, window, table) for table in tables])
