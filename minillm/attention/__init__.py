"""Masks, and attention in plain tensors and through torch's fused kernel: the base of both ladder and kernels.

May import nothing but `errors`.
"""

from minillm import hand_on

__getattr__, __dir__, __all__ = hand_on(
    __name__,
    {
        "attention": (
            "Kernel additive_mask attention_weights fused_attention masked_attention sdpa_attention "
            "zero_or_minus_infinity"
        ),
        "masks": "causal rectangular visible",
    },
)
