"""Converted models on two ranks, over gloo. What each rank checks is in trained_ranks.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers import output_of, started
from twins import small

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)

#: written out, so that the test notices a check that is gone
CHECKS = {
    "ddp",
    "ddp_without_exchange",
    "fsdp2",
    "fsdp2_with_a_loss_outside",
    "fsdp2_with_a_loss_of_the_logits",
    "fsdp2_of_a_model_converted_later",
    "fsdp2_with_mixed_precision",
    "fsdp2_with_checkpointing",
}


def test_two_ranks(tmp_path):
    small("llama")  # else this skips
    with started(Path(__file__).with_name("trained_ranks.py"), tmp_path) as ranks:
        passed = re.findall(r"^ok check_(\w+)$", output_of(ranks), re.MULTILINE)
    assert set(passed) == CHECKS
