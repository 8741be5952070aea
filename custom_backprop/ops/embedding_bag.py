"""Autograd of embedding_bag. Saved are the indices and bounds; W and the per-sample weights only
for one another's gradient; of maxima, what they picked."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import embedding_bag as primitives
from ..formulas import embedding_bag as formula
from ..formulas.embedding import sparse_gradient
from .route import op


class EmbeddingBag:
    """y_b = Σ p_k W_t;  dW_v = Σ p_k dy_b [t_k = v], dp_k = <dy_b, W_t>."""

    forward_op, backward_op = primitives.forward, primitives.backward
    has_statistics = True

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        weight, per_sample, index, bounds, *ctx.options, ctx.sparse = inputs
        need_weight, need_per_sample = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            weight if need_per_sample else None,
            per_sample if need_weight or need_per_sample else None,
            output[1], index, bounds,
        )  # fmt: skip
        ctx.rows = weight.shape[0]

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        needs, saved = ctx.needs_input_grad[:2], ctx.saved_tensors
        if not (ctx.sparse and needs[0]):
            return run(dy, *saved, ctx.rows, *ctx.options, *needs)
        _, per_sample, _, index, bounds = saved
        mode, padding, _ = ctx.options
        each = formula.entry_gradients(dy, per_sample, index, bounds, mode, padding).to(dy.dtype)
        dw, dp = sparse_gradient(each, index, ctx.rows, padding), None
        if needs[1]:
            dp = run(dy, *saved, ctx.rows, *ctx.options, False, True)[1]
        return dw, dp

    @staticmethod
    def jvp(ctx: Any, tw: Tensor | None, tp: Tensor | None, *_: None) -> Tensor:
        return formula.bag_jvp(tw, tp, *ctx.saved_tensors, *ctx.options)


#: embedding_bag(weight, per_sample_weights, index, bounds, mode, padding_idx, scale_grad_by_freq,
#: sparse), where the entries of bag b are those in [bounds[b], bounds[b + 1])
embedding_bag = op(EmbeddingBag)
