"""Layers that cost time and save no memory: ``convert`` leaves them unless ``include`` names them.

The figures are stock's time over ours, forward and backward, at the large size of
``python -m benchmarks.report`` (benchmarks/results), where the microseconds of a call no longer
count; of batch norms, a step of the ResNet of ``python -m benchmarks.models``. Listed is what takes
a fifth more time or worse, or slows a whole model. On a GPU there is no such layer.
"""

from __future__ import annotations

import torch

#: device -> class of torch -> stock's time over ours
LOSES: dict[str, dict[type, float]] = {
    "cpu": {
        torch.nn.BatchNorm1d: 0.92,
        torch.nn.BatchNorm2d: 0.92,
        torch.nn.BatchNorm3d: 0.92,
        torch.nn.BCEWithLogitsLoss: 0.72,
        torch.nn.Dropout1d: 0.58,
        torch.nn.Dropout2d: 0.62,
        torch.nn.Dropout3d: 0.60,
        torch.nn.EmbeddingBag: 0.82,
        torch.nn.FeatureAlphaDropout: 0.54,
    },
}


def why_it_loses(theirs: type, device: str) -> str | None:
    """In words; None of a layer that does not."""
    ratio = LOSES.get(device, {}).get(theirs)
    return None if ratio is None else f"loses on this device ({device}): {ratio:.2f}x"
