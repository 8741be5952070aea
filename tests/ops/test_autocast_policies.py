"""What each definition says of autocast, held against torch's own lists, which its headers carry:
no GPU is needed."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

from custom_backprop import ops

HEADER = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"


def listed(name):
    """The operators of one of torch's lists."""
    source = HEADER.read_text().replace("\\\n", " ")
    (line,) = re.findall(rf"#define {name}\(_\)(.*)", source)
    return set(re.findall(r"_\((?:ADD_NS\()?(\w+)", line))


def definitions():
    """name -> what its op's definition says of autocast on a GPU."""
    found = {}
    for module in pkgutil.iter_modules(ops.__path__):
        for value in vars(importlib.import_module(f"{ops.__name__}.{module.name}")).values():
            for op in value.values() if isinstance(value, dict) else [value]:
                if (definition := getattr(op, "definition", None)) is not None:
                    name = definition.forward_op.operator._schema.name.partition("::")[2]
                    policy = getattr(definition, "autocast", {}).get("cuda")
                    found.setdefault(name.removesuffix("_forward"), policy)  # the plain loss first
    return found


@pytest.mark.skipif(not HEADER.exists(), reason="torch came without its headers")
def test_policies_are_torchs():
    lower, float32 = listed("AT_FORALL_LOWER_PRECISION_FP"), listed("AT_FORALL_FP32")
    assert {"linear", "prelu"} <= lower
    found = definitions()
    expected = {n: "lower" for n in found if n in lower} | {
        n: "float32" for n in found if n in float32
    }
    assert len(expected) >= 12
    assert {n: found[n] for n in expected} == expected
    elsewhere = {n for n in found if n not in expected and n not in torch.nn.functional.__dict__}
    alone = {n for n, policy in found.items() if policy and n not in expected} - elsewhere
    # stock's are put together: of log_softmax and nll_loss, of linear and cross_entropy, of
    # logarithms, of vector_norm
    put_together = {"cross_entropy", "linear_cross_entropy", "gaussian_nll_loss", "normalize"}
    assert alone <= put_together | {"binary_cross_entropy"}
