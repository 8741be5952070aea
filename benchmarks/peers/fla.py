"""Ops of flash-linear-attention."""

from __future__ import annotations

from .op import Op

_PACKAGE = "flash-linear-attention"


def _module(
    module: str, name: str, call: str, inputs: str, reference: str, leaves: int | None = None
) -> Op:
    return Op(
        _PACKAGE,
        name,
        f"from fla.{module} import {name}",
        call.replace("OP", name),
        inputs,
        reference,
        leaves,
    )


_LABELS = "tensor([1, 4, 0, 2, 6])"
_QKV = "randn(1, 5, 2, 16), randn(1, 5, 2, 16), randn(1, 5, 2, 16)"


#: the recurrence of linear attention with a decay for each key
_RECURRENT = """

def recurrent(q, k, v, decay):
    state, rows = q.new_zeros(1, 2, 16, 16), []
    for t in range(q.shape[1]):
        state = state * decay[:, t].exp() + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append((q[:, t, :, :, None] * state).sum(-2) / 4)
    return torch.stack(rows, 1)

"""

OPS = [
    _module(
        "modules.activations",
        "sigmoid",
        "lambda x: OP(x)",
        "[randn(5, 7)]",
        "lambda x: torch.sigmoid(x)",
    ),
    _module(
        "modules.activations",
        "logsigmoid",
        "lambda x: OP(x)",
        "[randn(5, 7)]",
        "lambda x: F.logsigmoid(x)",
    ),
    _module(
        "modules.activations",
        "swish",
        "lambda x: OP(x)",
        "[randn(5, 7)]",
        "lambda x: F.silu(x)",
    ),
    _module(
        "modules.activations",
        "sqrelu",
        "lambda x: OP(x)",
        "[randn(5, 7)]",
        "lambda x: torch.relu(x).square()",
    ),
    _module(
        "modules.activations",
        "elu_p1",
        "lambda x: OP(x)",
        "[randn(5, 7)]",
        "lambda x: F.elu(x) + 1",
    ),
    _module(
        "modules.activations",
        "swiglu",
        "lambda x, y: OP(x, y)",
        "[randn(5, 7), randn(5, 7)]",
        "lambda x, y: F.silu(x) * y",
    ),
    _module(
        "modules.activations",
        "sigmoidglu",
        "lambda x, y: OP(x, y)",
        "[randn(5, 7), randn(5, 7)]",
        "lambda x, y: torch.sigmoid(x) * y",
    ),
    _module(
        "modules.activations",
        "swiglu_linear",
        "lambda x, y, weight, bias: OP(x, y, weight, bias)",
        "[randn(5, 7), randn(5, 7), randn(3, 7), randn(3)]",
        "lambda x, y, weight, bias: F.linear(F.silu(x) * y, weight, bias)",
    ),
    _module(
        "modules.norm.layernorm",
        "layer_norm",
        "lambda x, weight, bias: OP(x, weight, bias)",
        "[randn(5, 7), randn(7), randn(7)]",
        "lambda x, weight, bias: F.layer_norm(x, (7,), weight, bias, 1e-5)",
    ),
    _module(
        "modules.norm.layernorm",
        "rms_norm",
        "lambda x, weight: OP(x, weight, None)",
        "[randn(5, 7), randn(7)]",
        "lambda x, weight: F.rms_norm(x, (7,), weight, 1e-5)",
    ),
    _module(
        "modules.norm.layernorm",
        "group_norm",
        "lambda x, weight, bias: OP(x, weight, bias, num_groups=2)",
        "[randn(5, 8), randn(8), randn(8)]",
        "lambda x, weight, bias: F.group_norm(x, 2, weight, bias, 1e-5)",
    ),
    _module(
        "modules.norm.l2norm",
        "l2norm",
        "lambda x: OP(x)",
        "[randn(5, 7)]",
        "lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)",
    ),
    _module(
        "modules.norm.fused_norm_gate",
        "rms_norm_gated",
        "lambda x, g, weight: OP(x, g, weight, None)",
        "[randn(5, 7), randn(5, 7), randn(7)]",
        "lambda x, g, weight: F.rms_norm(x, (7,), weight, 1e-6) * F.silu(g)",
    ),
    _module(
        "modules.fused_cross_entropy.ops",
        "cross_entropy_loss",
        "lambda x, target: OP(x, target)[0]",
        f"[randn(5, 7), {_LABELS}]",
        "lambda x, target: F.cross_entropy(x, target, reduction='none')",
    ),
    _module(
        "modules.fused_linear_cross_entropy.ops",
        "fused_linear_cross_entropy_loss",
        "lambda x, target, weight: OP(x, target, weight, num_chunks=2)",
        f"[randn(5, 3), {_LABELS}, randn(7, 3)]",
        "lambda x, target, weight: F.cross_entropy(F.linear(x, weight), target)",
    ),
    _module(
        "modules.token_shift",
        "token_shift",
        "lambda x: OP(x)",
        "[randn(2, 5, 3)]",
        "lambda x: F.pad(x, (0, 0, 1, -1)) - x",
    ),
    _module(
        "modules.rotary.ops",
        "rotary_embedding",
        "lambda x, cos, sin: OP(x, cos, sin)",
        "[randn(1, 5, 2, 8), rand(5, 4), rand(5, 4)]",
        "lambda x, cos, sin: torch.cat([x[..., :4] * cos[:, None] - x[..., 4:] * sin[:, None], "
        "x[..., :4] * sin[:, None] + x[..., 4:] * cos[:, None]], -1)",
        leaves=1,
    ),
    _module(
        "modules.l2warp",
        "l2_warp",
        "lambda loss, logits: OP(loss, logits)",
        "[randn(()), randn(1, 5, 7)]",
        "lambda loss, logits: loss + (lambda extra: extra - extra.detach())"
        "(logits.amax(-1).square().sum() * 1e-4 / 5 / 2)",
    ),
    Op(
        _PACKAGE,
        "fused_recurrent_linear_attn",
        "from fla.ops.linear_attn import fused_recurrent_linear_attn" + _RECURRENT,
        "lambda q, k, v: fused_recurrent_linear_attn(q, k, v)[0]",
        f"[{_QKV}]",
        "lambda q, k, v: recurrent(q, k, v, q.new_zeros(1, 5, 2, 1, 1))",
    ),
    Op(
        _PACKAGE,
        "fused_recurrent_simple_gla",
        "from fla.ops.simple_gla import fused_recurrent_simple_gla" + _RECURRENT,
        "lambda q, k, v, g: fused_recurrent_simple_gla(q, k, v, g)[0]",
        f"[{_QKV}, -rand(1, 5, 2)]",
        "lambda q, k, v, g: recurrent(q, k, v, g[..., None, None])",
    ),
    Op(
        _PACKAGE,
        "chunk_simple_gla",
        "from fla.ops.simple_gla import chunk_simple_gla" + _RECURRENT,
        "lambda q, k, v, g: chunk_simple_gla(q, k, v, g)[0]",
        f"[{_QKV}, -rand(1, 5, 2)]",
        "lambda q, k, v, g: recurrent(q, k, v, g[..., None, None])",
    ),
    Op(
        _PACKAGE,
        "fused_recurrent_gla",
        "from fla.ops.gla import fused_recurrent_gla" + _RECURRENT,
        "lambda q, k, v, g: fused_recurrent_gla(q, k, v, g)[0]",
        f"[{_QKV}, -rand(1, 5, 2, 16)]",
        "lambda q, k, v, g: recurrent(q, k, v, g[..., None])",
    ),
    Op(
        _PACKAGE,
        "chunk_gla",
        "from fla.ops.gla import chunk_gla" + _RECURRENT,
        "lambda q, k, v, g: chunk_gla(q, k, v, g)[0]",
        f"[{_QKV}, -rand(1, 5, 2, 16)]",
        "lambda q, k, v, g: recurrent(q, k, v, g[..., None])",
    ),
    _module(
        "ops.hgrn",
        "fused_recurrent_hgrn",
        "lambda x, g: OP(x, g)[0]",
        "[randn(1, 5, 7), -rand(1, 5, 7)]",
        "lambda x, g: torch.stack([sum(x[:, s] * g[:, s + 1:t + 1].sum(1).exp() "
        "for s in range(t + 1)) for t in range(5)], 1)",
    ),
]
