"""Every module under every tool that traces: as stock's."""

from __future__ import annotations

import warnings

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import DEVICE
from torch._dynamo.backends.common import aot_autograd

import custom_backprop
from custom_backprop.testing import Make, database

SPECS = [spec for spec in database().values() if spec.module]


@pytest.fixture(params=SPECS, ids=str)
def case(request):
    """(our module, stock's with the same parameters, inputs)."""
    ours, stock, arguments, make = request.param.module
    torch.manual_seed(0)
    module = ours(**arguments).to(DEVICE, torch.float64)
    twin = stock(**arguments).to(DEVICE, torch.float64)
    twin.load_state_dict(module.state_dict())
    return module, twin, make(Make(DEVICE))


def assert_same(traced, twin, inputs):
    found = []
    for module in (traced, twin):
        leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        y = module(*leaves)
        wanted = [t for t in leaves if t.requires_grad] or list(module.parameters())
        torch.manual_seed(1)
        grads = torch.autograd.grad(y, wanted, torch.randn_like(y)) if y.requires_grad else ()
        found.append((y, grads))
    torch.testing.assert_close(*found)


def test_compiled(case, request):
    """Of an elementwise op the compiler sees nothing but torch's own operators, which it fuses, in
    forward and in backward."""
    module, twin, inputs = case
    graphs = []

    def keep(graph, _):
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    assert_same(compiled, twin, inputs)
    assert len(graphs) == 2
    if request.node.callspec.params["case"].elementwise:
        called = [str(node.target) for graph in graphs for node in graph.nodes]
        assert not [name for name in called if "custom_backprop" in name]


@pytest.mark.parametrize("strict", [False, True])
def test_exported(case, strict):
    module, twin, inputs = case
    program = torch.export.export(module, inputs, strict=strict)
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not [name for name in called if "custom_backprop" in name], (
        "a formula is all that is seen"
    )
    plain = tuple(t.detach() for t in inputs)
    torch.testing.assert_close(program.module()(*plain), twin(*plain))


def test_symbolically_traced(case):
    """At least where stock's forward can be."""
    module, twin, inputs = case
    try:
        traced = torch.fx.symbolic_trace(module)
    except torch.fx.proxy.TraceError:
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.Tracer().trace(twin)
        return
    assert_same(traced, twin, inputs)


def test_traced_by_jit(case):
    module, twin, inputs = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if isinstance(module, torch.nn.modules.instancenorm._InstanceNorm):
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of stock's own check
        traced = torch.jit.trace(module, inputs)
    assert "PythonOp" not in str(traced.inlined_graph)
    assert_same(traced, twin, inputs)


@pytest.mark.filterwarnings("ignore")
def test_a_converted_model_becomes_onnx():
    """Its operators are ONNX's own: a formula is what the exporter is shown."""
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8),
        torch.nn.GELU(),
        torch.nn.LayerNorm(8),
        torch.nn.PReLU(),
        torch.nn.Softmax(-1),
        torch.nn.RMSNorm(8),
        torch.nn.Mish(),
        torch.nn.Linear(8, 2),
        torch.nn.LogSoftmax(-1),
    )
    custom_backprop.convert(model)
    program = torch.onnx.export(model, (torch.randn(3, 4),), dynamo=True, verbose=False)
    assert {node.domain for node in program.model.graph} == {""}
