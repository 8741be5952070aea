"""flash-attn, in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PACKAGE = "flash-attn"


def ops() -> dict[str, Callable[..., Any]]:
    """Imports the package."""
    from flash_attn import flash_attn_func

    def attention(q, k, v, is_causal=False, enable_gqa=False):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return flash_attn_func(q, k, v, causal=is_causal).transpose(1, 2)

    return {"scaled_dot_product_attention": attention}
