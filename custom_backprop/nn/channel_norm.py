"""Group, instance and batch normalization as modules: the ``torch.nn`` class of the same name with
another ``forward``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import functional as F

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "SyncBatchNorm",
]


def _counted(module: torch.nn.modules.batchnorm._BatchNorm) -> tuple[tuple[Any, Any], bool, float]:
    """The running statistics that take part, whether those of the batch do, and the momentum; the
    batch is counted."""
    tracks = module.training and module.track_running_stats
    momentum = module.momentum or 0.0
    if tracks and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:  # the mean of all batches
            momentum = 1.0 / float(module.num_batches_tracked)
    running = module.running_mean, module.running_var
    by_batch = module.training or all(t is None for t in running)
    return (None, None) if module.training and not tracks else running, by_batch, momentum


def _forward(self: torch.nn.modules.batchnorm._BatchNorm, input: Tensor) -> Tensor:
    self._check_input_dim(input)
    running, by_batch, momentum = _counted(self)
    return F.batch_norm(input, *running, self.weight, self.bias, by_batch, momentum, self.eps)


class BatchNorm1d(torch.nn.BatchNorm1d):
    """See :func:`custom_backprop.functional.batch_norm`."""

    loses_on_a_cpu = 0.92  # stock's time over ours
    forward = _forward


class BatchNorm2d(torch.nn.BatchNorm2d):
    """See :func:`custom_backprop.functional.batch_norm`."""

    loses_on_a_cpu = 0.92  # stock's time over ours
    forward = _forward


class BatchNorm3d(torch.nn.BatchNorm3d):
    """See :func:`custom_backprop.functional.batch_norm`."""

    loses_on_a_cpu = 0.92  # stock's time over ours
    forward = _forward


class GroupNorm(torch.nn.GroupNorm):
    """See :func:`custom_backprop.functional.group_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _apply(self: torch.nn.modules.instancenorm._InstanceNorm, input: Tensor) -> Tensor:
    """What stock's ``forward`` calls once it has checked the input."""
    by_input = self.training or not self.track_running_stats
    running, momentum = (self.running_mean, self.running_var), self.momentum or 0.0
    return F.instance_norm(input, *running, self.weight, self.bias, by_input, momentum, self.eps)


class InstanceNorm1d(torch.nn.InstanceNorm1d):
    """See :func:`custom_backprop.functional.instance_norm`."""

    _apply_instance_norm = _apply


class InstanceNorm2d(torch.nn.InstanceNorm2d):
    """See :func:`custom_backprop.functional.instance_norm`."""

    _apply_instance_norm = _apply


class InstanceNorm3d(torch.nn.InstanceNorm3d):
    """See :func:`custom_backprop.functional.instance_norm`."""

    _apply_instance_norm = _apply


class SyncBatchNorm(torch.nn.SyncBatchNorm):
    """In training by the statistics of the batches of all ranks together, on every device: see
    :func:`custom_backprop.distributed.sync_batch_norm`. Else, and of one process, see
    :func:`custom_backprop.functional.batch_norm`.
    """

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        running, by_batch, momentum = _counted(self)
        if self.training and dist.is_available() and dist.is_initialized():
            group = self.process_group or dist.distributed_c10d._get_default_group()
            if group.size() > 1:
                from ..distributed import sync_batch_norm

                return sync_batch_norm(
                    input, *running, self.weight, self.bias, momentum, self.eps, group
                )
        return F.batch_norm(input, *running, self.weight, self.bias, by_batch, momentum, self.eps)
