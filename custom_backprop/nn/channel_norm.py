"""Group, instance and batch normalization as modules: the ``torch.nn`` class of the same name with
another ``forward``."""

from __future__ import annotations

import torch
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
]


def _forward(self: torch.nn.modules.batchnorm._BatchNorm, input: Tensor) -> Tensor:
    self._check_input_dim(input)
    tracks = self.training and self.track_running_stats
    momentum = self.momentum or 0.0
    if tracks and self.num_batches_tracked is not None:
        self.num_batches_tracked.add_(1)
        if self.momentum is None:  # the mean of all batches
            momentum = 1.0 / float(self.num_batches_tracked)
    running = self.running_mean, self.running_var
    by_batch = self.training or all(t is None for t in running)
    if self.training and not tracks:
        running = None, None
    return F.batch_norm(input, *running, self.weight, self.bias, by_batch, momentum, self.eps)


class BatchNorm1d(torch.nn.BatchNorm1d):
    """See :func:`custom_backprop.functional.batch_norm`."""

    forward = _forward


class BatchNorm2d(torch.nn.BatchNorm2d):
    """See :func:`custom_backprop.functional.batch_norm`."""

    forward = _forward


class BatchNorm3d(torch.nn.BatchNorm3d):
    """See :func:`custom_backprop.functional.batch_norm`."""

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
