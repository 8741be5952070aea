"""The formula of a node: what forward computed there, and what backward computes from dy."""

from __future__ import annotations

import inspect
from typing import Any

COMPILED = "a compiled region: one node for all that the compiler fused"


def formula_of(node: Any, op: str) -> str:
    """Of a Function, the first paragraph of its docstring, which for ours is its formula; of
    stock's nodes, that of :data:`STOCK`; "" if there is none."""
    function = getattr(node, "_forward_cls", None)
    if function is None:
        return STOCK.get(op, "")
    if function.__name__ == "CompiledFunction":
        return COMPILED
    paragraph = inspect.cleandoc(function.__doc__ or "").split("\n\n")[0]
    return " ".join(paragraph.split()).removesuffix(".")


#: op -> formula, for the nodes that PyTorch itself makes: y is forward's result, dy = ∂L/∂y, [c] is
#: 1 where c holds and else 0, σ the logistic function, Φ and φ the normal distribution and density
STOCK = {
    "leaf": "∂L/∂w arrives here",
    # sums and products
    "Add": "y = a + c b;  da = dy, db = c dy",
    "Sub": "y = a - c b;  da = dy, db = -c dy",
    "Rsub": "y = b - c a;  da = -c dy, db = dy",
    "Mul": "y = a b;  da = dy b, db = dy a",
    "Div": "y = a / b;  da = dy / b, db = -dy y / b",
    "Neg": "y = -x;  dx = -dy",
    "Addcmul": "y = a + c b d;  da = dy, db = c dy d, dd = c dy b",
    "Addcdiv": "y = a + c b / d;  da = dy, db = c dy / d, dd = -c dy b / d²",
    "Lerp": "y = a + t (b - a);  da = (1 - t) dy, db = t dy, dt = dy (b - a)",
    "Addmm": "y = b + x W;  db = Σ_rows dy, dx = dy Wᵀ, dW = xᵀ dy",
    "Mm": "y = a b;  da = dy bᵀ, db = aᵀ dy",
    "Bmm": "y = a b;  da = dy bᵀ, db = aᵀ dy, batch by batch",
    "Baddbmm": "y = c + a b;  dc = dy, da = dy bᵀ, db = aᵀ dy, batch by batch",
    "Addbmm": "y = c + Σ a b;  dc = dy, da = dy bᵀ, db = aᵀ dy",
    "Mv": "y = A x;  dA = dy xᵀ, dx = Aᵀ dy",
    "Dot": "y = a · b;  da = dy b, db = dy a",
    "Linear": "y = x Wᵀ + b;  dx = dy W, dW = dyᵀ x, db = Σ_rows dy",
    "Convolution": "y = w ⋆ x + b;  dx = dy ∗ w, dw = dy ⋆ x, db = Σ dy",
    # elementwise
    "Pow": "y = x^n;  dx = n x^(n-1) dy",
    "Sqrt": "y = √x;  dx = dy / 2y",
    "Rsqrt": "y = 1/√x;  dx = -dy y³ / 2",
    "Reciprocal": "y = 1/x;  dx = -dy y²",
    "Exp": "y = e^x;  dx = dy y",
    "Expm1": "y = e^x - 1;  dx = dy (y + 1)",
    "Log": "y = log x;  dx = dy / x",
    "Log1P": "y = log(1 + x);  dx = dy / (1 + x)",
    "Log2": "y = log₂ x;  dx = dy / (x log 2)",
    "Sin": "y = sin x;  dx = dy cos x",
    "Cos": "y = cos x;  dx = -dy sin x",
    "Tanh": "y = tanh x;  dx = dy (1 - y²)",
    "Sigmoid": "y = σ(x);  dx = dy y (1 - y)",
    "Erf": "y = erf x;  dx = dy 2 e^(-x²) / √π",
    "Abs": "y = |x|;  dx = dy sign x",
    "Clamp": "y = min(max(x, l), h);  dx = dy [l <= x <= h]",
    "ClampMin": "y = max(x, l);  dx = dy [x >= l]",
    "ClampMax": "y = min(x, h);  dx = dy [x <= h]",
    "Where": "y = a or b;  da = dy [c], db = dy [not c]",
    "Maximum": "y = max(a, b);  da = dy [a > b], db = dy [b > a], half each where equal",
    "Minimum": "y = min(a, b);  da = dy [a < b], db = dy [b < a], half each where equal",
    "MaskedFill": "y = x, or v where masked;  dx = dy [not masked]",
    "Relu": "y = max(x, 0);  dx = dy [y > 0]",
    "LeakyRelu": "y = x [x > 0] + a x [x <= 0];  dx = dy ([x > 0] + a [x <= 0])",
    "Elu": "y = x or α(e^x - 1);  dx = dy or dy α e^x",
    "Gelu": "y = x Φ(x);  dx = dy (Φ + x φ)",
    "Silu": "y = x σ(x);  dx = dy σ (1 + x (1 - σ))",
    "Mish": "y = x t, t = tanh(softplus x);  dx = dy (t + x (1 - t²) σ(x))",
    "Softplus": "y = log(1 + e^x);  dx = dy σ(x)",
    "LogSigmoid": "y = log σ(x);  dx = dy σ(-x)",
    "Hardtanh": "y = min(max(x, l), h);  dx = dy [l < x < h]",
    "Hardsigmoid": "y = min(max(x/6 + 1/2, 0), 1);  dx = dy [|x| < 3] / 6",
    "Hardswish": "y = x hardsigmoid(x);  dx = dy (x/3 + 1/2) inside, 0 or dy outside",
    "Threshold": "y = x [x > θ] + v [x <= θ];  dx = dy [x > θ]",
    "Glu": "y = a σ(b);  da = dy σ, db = dy y (1 - σ)",
    "PreluKernel": "y = x [x > 0] + w x [x <= 0];  dw = Σ dy x [x <= 0]",
    "NativeDropout": "y = m x / (1 - p);  dx = m dy / (1 - p)",
    # reductions
    "Sum": "y = Σ x;  dx = dy, repeated",
    "Mean": "y = Σ x / n;  dx = dy / n, repeated",
    "Prod": "y = Π x;  dx = dy y / x",
    "Std": "y = std x;  dx = dy (x - μ) / ((n - 1) y)",
    "Var": "y = var x;  dx = 2 dy (x - μ) / (n - 1)",
    "Max": "y = max x;  dx = dy where x is the largest",
    "Min": "y = min x;  dx = dy where x is the smallest",
    "Amax": "y = max x;  dx = dy where x is the largest, in equal shares",
    "Amin": "y = min x;  dx = dy where x is the smallest, in equal shares",
    "LinalgVectorNorm": "y = ‖x‖;  dx = dy x / y",
    "Logsumexp": "y = log Σ e^x;  dx = dy e^(x - y)",
    "Cumsum": "y_i = Σ_{j ≤ i} x_j;  dx_j = Σ_{i ≥ j} dy_i",
    # normalisations and probabilities
    "Softmax": "y = softmax x;  dx = y (dy - Σ y dy)",
    "LogSoftmax": "y = x - log Σ e^x;  dx = dy - e^y Σ dy",
    "NativeLayerNorm": "y = w x̂ + b, x̂ = r (x - μ);  dx = r (g - Σ g/n - x̂ Σ g x̂/n), g = w dy",
    "NativeGroupNorm": "y = w x̂ + b, x̂ = r (x - μ);  dx = r (g - Σ g/n - x̂ Σ g x̂/n), g = w dy",
    "NativeBatchNorm": "y = w x̂ + b, x̂ = r (x - μ);  dx = w r (dy - Σ dy/n - x̂ Σ dy x̂/n)",
    "CudnnBatchNorm": "y = w x̂ + b, x̂ = r (x - μ);  dx = w r (dy - Σ dy/n - x̂ Σ dy x̂/n)",
    "FusedRmsNorm": "y = w x̂, x̂ = r x;  dx = r (g - x̂ Σ g x̂/n), g = w dy",
    "ScaledDotProductFlashAttention": "y = P v, P = softmax(c q kᵀ);  ds = P (dy vᵀ - dy · y), "
    "dq = c ds k, dk = c dsᵀ q, dv = Pᵀ dy",
    # losses
    "NllLoss": "L = -w_t x_t;  dx_c = -w_t dL [c = t]",
    "NllLoss2D": "L = -w_t x_t;  dx_c = -w_t dL [c = t]",
    "MseLoss": "L = (x - t)²;  dx = 2 dL (x - t)",
    "SmoothL1Loss": "L = d²/2β or |d| - β/2;  dx = dL d/β or dL sign d, d = x - t",
    "HuberLoss": "L = d²/2 or δ(|d| - δ/2);  dx = dL d or dL δ sign d, d = x - t",
    "BinaryCrossEntropy": "L = -t log x - (1 - t) log(1 - x);  dx = dL (x - t) / (x (1 - x))",
    "BinaryCrossEntropyWithLogits": "L = -t log σ(x) - (1 - t) log σ(-x);  dx = dL (σ(x) - t)",
    # picking, placing and shaping
    "Embedding": "y_r = W_t;  dW_v = Σ dy_r [t = v]",
    "Index": "y = x[i];  dx[i] += dy",
    "IndexSelect": "y = x[i];  dx[i] += dy",
    "Gather": "y = x[i];  dx[i] += dy",
    "IndexPut": "y = x with v at i;  dv = dy[i], dx = dy, 0 at i",
    "Scatter": "y = x with v at i;  dv = dy[i], dx = dy, 0 at i",
    "Slice": "y = part of x;  dx = dy there, else 0",
    "Select": "y = part of x;  dx = dy there, else 0",
    "ConstantPadNd": "y = x in a frame;  dx = dy without the frame",
    "Cat": "y = (a, b, ...);  da, db, ... = parts of dy",
    "Stack": "y = (a, b, ...);  da, db, ... = parts of dy",
    "Split": "a, b, ... = parts of x;  dx = (da, db, ...)",
    "SplitWithSizes": "a, b, ... = parts of x;  dx = (da, db, ...)",
    "Unbind": "a, b, ... = parts of x;  dx = (da, db, ...)",
    "Expand": "y = x, repeated;  dx = Σ dy over the repetitions",
    "Repeat": "y = x, repeated;  dx = Σ dy over the repetitions",
    "Clone": "y = x, copied;  dx = dy",
    "ToCopy": "y = x in another dtype;  dx = dy in x's dtype",
    "Tril": "y = x below the diagonal;  dx = dy below it",
    "Triu": "y = x above the diagonal;  dx = dy above it",
    "AvgPool2D": "y = mean of a window;  dx = dy / n, added over the windows",
    "MaxPool2DWithIndices": "y = max of a window;  dx = dy where x is the largest",
    "MkldnnConvolution": "y = w ⋆ x + b;  dx = dy ∗ w, dw = dy ⋆ x, db = Σ dy",
    "CopySlices": "y = x with v in a part;  dv = dy there, dx = dy, 0 there",
}

#: nodes that only give the same numbers another shape
SHAPING = (
    "View", "UnsafeView", "ReshapeAlias", "T", "Transpose", "Permute", "Unsqueeze", "Squeeze",
    "AsStrided", "Alias", "ViewAsReal", "ViewAsComplex",
)  # fmt: skip
STOCK |= dict.fromkeys(SHAPING, "y = x in another shape;  dx = dy in the shape of x")
# attention by its other kernels is the same attention
STOCK |= {
    f"ScaledDotProduct{how}": STOCK["ScaledDotProductFlashAttention"]
    for how in ("FlashAttentionForCpu", "EfficientAttention", "CudnnAttention")
}
