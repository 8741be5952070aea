"""Ops of liger-kernel."""

from __future__ import annotations

from typing import Any

from .op import Op

_PACKAGE = "liger-kernel"


def _functional(name: str, call: str, inputs: str, reference: str, **options: Any) -> Op:
    """An op of ``liger_kernel.transformers.functional``."""
    return Op(
        _PACKAGE,
        name,
        f"from liger_kernel.transformers.functional import liger_{name}",
        call.replace("OP", f"liger_{name}"),
        inputs,
        reference,
        **options,
    )


_LABELS = "tensor([1, 4, 0, 2, 6])"
_LOG_P = "F.log_softmax(randn(5, 7), -1)"
_NORM = "[randn(5, 7), randn(7)]"
_ROPE = "[randn(1, 2, 3, 8), randn(1, 2, 3, 8), *_angles()]"
_ANGLES = """

def _angles():
    angle = arange(3.0)[:, None] / 100 ** (arange(4.0) / 4)
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos(), angle.sin()


def rotated(x, cos, sin):
    half = torch.cat([-x[..., 4:], x[..., :4]], -1)
    return x * cos[:, None] + half * sin[:, None]

"""

OPS = [
    _functional(
        "cross_entropy",
        "lambda x, target: OP(x, target)",
        f"[randn(5, 7), {_LABELS}]",
        "lambda x, target: F.cross_entropy(x, target)",
    ),
    _functional(
        "fused_linear_cross_entropy",
        "lambda x, weight, target: OP(x, weight, target)",
        f"[randn(5, 3), randn(7, 3), {_LABELS}]",
        "lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target)",
    ),
    _functional(
        "kl_div",
        "lambda x, target: OP(x, target, reduction='batchmean')",
        f"[{_LOG_P}, F.softmax(randn(5, 7), -1)]",
        "lambda x, target: F.kl_div(x, target, reduction='batchmean')",
        leaves=1,
    ),
    _functional(
        "jsd",
        "lambda x, target: OP(x, target)",
        f"[{_LOG_P}, {_LOG_P}]",
        "lambda x, y: (lambda m: (y.exp() * (y - m) + x.exp() * (x - m)).sum() / 2 / len(x))"
        "(torch.log((x.exp() + y.exp()) / 2))",
        leaves=1,
    ),
    _functional(
        "tvd",
        "lambda p, q: OP(p, q, reduction='batchmean')",
        "[F.softmax(randn(5, 7), -1), F.softmax(randn(5, 7), -1)]",
        "lambda p, q: (p - q).abs().sum() / 2 / len(p)",
        leaves=1,
    ),
    _functional("softmax", "lambda x: OP(x)", "[randn(5, 7)]", "lambda x: F.softmax(x, -1)"),
    _functional(
        "sparsemax",
        "lambda x: OP(x)",
        "[randn(5, 7)]",
        "lambda x: (lambda z: (lambda k: torch.relu(x - (z.cumsum(-1).gather(-1, k - 1) - 1) / k))"
        "(((1 + arange(1, 8) * z) > z.cumsum(-1)).sum(-1, keepdim=True)))"
        "(x.sort(-1, descending=True)[0])",
    ),
    _functional(
        "rms_norm",
        "lambda x, weight: OP(x, weight, 1e-6)",
        _NORM,
        "lambda x, weight: F.rms_norm(x, (7,), weight, 1e-6)",
    ),
    _functional(
        "layer_norm",
        "lambda x, weight, bias: OP(x, weight, bias, 1e-6)",
        "[randn(5, 7), randn(7), randn(7)]",
        "lambda x, weight, bias: F.layer_norm(x, (7,), weight, bias, 1e-6)",
    ),
    _functional(
        "group_norm",
        "lambda x, weight, bias: OP(x, weight, bias, 6, 3, 1e-6)",
        "[randn(3, 6, 5), randn(6), randn(6)]",
        "lambda x, weight, bias: F.group_norm(x, 3, weight, bias, 1e-6)",
    ),
    _functional(
        "fused_add_rms_norm",
        "lambda x, residual, weight: OP(x, residual, weight, 1e-6)",
        "[randn(5, 7), randn(5, 7), randn(7)]",
        "lambda x, residual, weight: (F.rms_norm(x + residual, (7,), weight, 1e-6), x + residual)",
    ),
    _functional(
        "poly_norm",
        "lambda x, weight, bias: OP(x, weight, bias)",
        "[randn(5, 7), randn(3), randn(())]",
        "lambda x, weight, bias: sum(w * F.rms_norm(x**n, (7,), None, 1e-6) "
        "for w, n in zip(weight, (3, 2, 1))) + bias",
    ),
    _functional(
        "dyt",
        "lambda x, alpha, gamma, beta: OP(x, alpha, gamma, beta)",
        "[randn(5, 7), rand(1), randn(7), randn(7)]",
        "lambda x, alpha, gamma, beta: gamma * torch.tanh(alpha * x) + beta",
        pretend_cuda=True,
    ),
    _functional(
        "geglu",
        "lambda a, b: OP(a, b)",
        "[randn(5, 7), randn(5, 7)]",
        "lambda a, b: F.gelu(a, approximate='tanh') * b",
    ),
    _functional(
        "swiglu",
        "lambda a, b: OP(a, b)",
        "[randn(5, 7), randn(5, 7)]",
        "lambda a, b: F.silu(a) * b",
    ),
    _functional(
        "relu_squared", "lambda x: OP(x)", "[randn(5, 7)]", "lambda x: torch.relu(x).square()"
    ),
    Op(
        _PACKAGE,
        "rope",
        "from liger_kernel.transformers.functional import liger_rope\n" + _ANGLES,
        "lambda q, k, cos, sin: liger_rope(q, k, cos, sin)",
        _ROPE,
        "lambda q, k, cos, sin: (rotated(q, cos, sin), rotated(k, cos, sin))",
        leaves=2,
    ),
    Op(
        _PACKAGE,
        "embedding",
        "from liger_kernel.ops.experimental.embedding import LigerEmbeddingFunction",
        "lambda table, index: LigerEmbeddingFunction.apply(table, index)",
        "[randn(7, 3), tensor([1, 4, 1, 0])]",
        "lambda table, index: F.embedding(index, table)",
    ),
    _functional(
        "multi_token_attention",
        "lambda scores, weight, bias: OP(scores, weight, bias, padding=1)",
        "[randn(1, 2, 5, 5), randn(2, 2, 3, 3), randn(2)]",
        "lambda scores, weight, bias: F.conv2d(F.softmax(scores.masked_fill("
        "torch.ones(5, 5).triu(1).bool(), -torch.inf), -1), weight, bias, padding=1)"
        ".masked_fill(torch.ones(5, 5).triu(1).bool(), 0)",
    ),
    _functional(
        "fused_linear_scaled_cross_entropy_tp",
        "lambda x, weight, target: OP(x, weight, target, None)",
        f"[randn(5, 3), randn(7, 3), {_LABELS}]",
        "lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target, reduction='none')",
        unavailable="it needs a process group of several GPUs",
    ),
]
