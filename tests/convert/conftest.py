"""Whole models, trained by the libraries that people train them with. These are imported inside the
tests: collection does not wait for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from custom_backprop.conversions import deferred


@pytest.fixture(autouse=True, scope="session")
def _hub() -> Iterator[None]:
    """Nothing is downloaded and nothing reported. The hub reads these variables when imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
            patch.setenv(name, "1")
        yield


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of small models are fused with their heads as those of large ones are. Without Hugging
    Face there are none."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(deferred, "LEAST", 0)
