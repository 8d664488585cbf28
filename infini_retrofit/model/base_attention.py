"""The base's own attention, by explicit products where these are faster.

An `attn_implementation` of `transformers`. Knows nothing of memory, segments and families.

Axes:
    B  row of the batch
    H  query head
    N  key/value head
    L  query token
    C  key token
    K  channel of a head
"""

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from infini_retrofit.layer.local_attention import prefers_products, softmax_attention

NAME = "infini_retrofit"


def attend(
    module: nn.Module,
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B N C K"],
    value: Float[Tensor, "B N C K"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Float[Tensor, "B L H K"], None]:
    """Attend like `sdpa`, with its masks: None means causal."""
    # Rotations are float32 where weights are: under autocast only the values are not.
    query, key = query.to(value.dtype), key.to(value.dtype)
    plain = attention_mask is None and dropout == 0 and query.shape[2] == key.shape[2]
    if plain and prefers_products(query, key, value):
        return softmax_attention(query, key, value, scaling=scaling).transpose(1, 2), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
