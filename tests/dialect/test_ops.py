"""Every dialect operator: reference, fake kernel, cost, life in torch.export and compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from rewriter.dialect import OPS

Call = tuple[tuple[Any, ...], dict[str, Any]]


def _rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _attention(**kwargs: Any) -> Call:
    options = {"softmax_scale": 0.25, "mask": "causal", **kwargs}
    return (_rand(2, 4, 5, 16), _rand(2, 2, 5, 16), _rand(2, 2, 5, 16)), options


def _rope(**kwargs: Any) -> Call:
    angle = _rand(2, 1, 5, 8)
    return (_rand(2, 4, 5, 16), angle.cos(), angle.sin()), kwargs


def _moe(**kwargs: Any) -> Call:
    weight = torch.rand(6, 2)
    index = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 1], [0, 3], [1, 0]])
    return (_rand(6, 8), index, weight, _rand(4, 12, 8), _rand(4, 8, 6)), kwargs


CALLS: dict[str, list[Call]] = {
    "attention": [_attention(), _attention(mask="sliding_window", span=3, softcap=2.0)],
    "rope": [_rope(interleaved=False), _rope(interleaved=True)],
    "rms_norm": [
        ((_rand(2, 5, 8), _rand(8)), {"eps": 1e-6}),
        ((_rand(2, 5, 8), _rand(8)), {"eps": 1e-6, "weight_offset": 1.0}),
        ((_rand(2, 5, 8),), {"eps": 1e-6}),
    ],
    "layer_norm": [((_rand(2, 5, 8), _rand(8), _rand(8)), {"eps": 1e-5})],
    "gated_mlp": [
        ((_rand(2, 5, 8), _rand(12, 8), _rand(12, 8), _rand(8, 12)), {"activation": "silu"}),
    ],
    "mlp": [((_rand(2, 5, 8), _rand(12, 8), _rand(8, 12)), {"activation": "gelu"})],
    "linear": [
        ((_rand(2, 5, 8), _rand(12, 8), _rand(12)), {}),
        ((_rand(1, 1, 512), _rand(1024, 512)), {}),
    ],
    "moe": [
        _moe(activation="silu", gating="halves"),
        _moe(activation="identity", gating="pairs", limit=7.0),
    ],
    "kv_append": [
        ((_rand(2, 2, 9, 4), _rand(2, 2, 9, 4), _rand(2, 2, 3, 4), _rand(2, 2, 3, 4), 4), {}),
    ],
}
"""One entry an operator that is tested here; operators of a pass are tested with the pass."""

CASES = [
    pytest.param(name, call, id=f"{name}-{i}")
    for name, calls in CALLS.items()
    for i, call in enumerate(calls)
]


def _detached(call: Call) -> Call:
    """A copy, because some operators mutate."""
    return pytree.tree_map_only(Tensor, lambda t: t.clone(), call)


@pytest.mark.parametrize("name", sorted(OPS))
def test_is_complete(name: str) -> None:
    op = OPS[name]
    assert op.name == name
    assert op.reference.__doc__
    assert op.overload is getattr(torch.ops.rewriter, name).default


@pytest.mark.parametrize(("name", "call"), CASES)
def test_fake_kernel_agrees(name: str, call: Call) -> None:
    (args, kwargs), op = _detached(call), OPS[name]
    real = op.overload(*args, **kwargs)
    with FakeTensorMode() as mode:
        fakes = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        fake = op.overload(*fakes[0], **fakes[1])
    if real is None:
        assert fake is None
        return
    assert (real.shape, real.dtype) == (fake.shape, fake.dtype)


@pytest.mark.parametrize(("name", "call"), CASES)
def test_bf16_keeps_its_dtype(name: str, call: Call) -> None:
    def narrow(tensor: Tensor) -> Tensor:
        return tensor.bfloat16() if tensor.is_floating_point() else tensor

    args, kwargs = pytree.tree_map_only(Tensor, narrow, _detached(call))
    out = OPS[name].overload(*args, **kwargs)
    if out is not None:
        assert out.dtype == torch.bfloat16
        assert out.isfinite().all()


@pytest.mark.parametrize(("name", "call"), CASES)
def test_costs_something(name: str, call: Call) -> None:
    args, kwargs = call
    cost = OPS[name].cost(*args, **kwargs)
    assert cost.bytes_moved > 0
    assert cost.launches > 0


class _Module(nn.Module):
    def __init__(self, op: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.kwargs = op, kwargs

    def forward(self, *args: Any) -> Any:
        out = self.op(*args, **self.kwargs)
        return args[0] * 1 if out is None else out


@pytest.mark.parametrize(("name", "call"), CASES)
def test_survives_export(name: str, call: Call) -> None:
    (args, kwargs), op = _detached(call), OPS[name]
    module = _Module(op.overload, kwargs)
    exported = torch.export.export(module, _detached(call)[0], strict=False)
    exported = exported.run_decompositions({})
    targets = {node.target for node in exported.graph.nodes}
    assert op.overload in targets or op.overload._schema.is_mutable
    assert torch.equal(exported.module()(*_detached(call)[0]), module(*args))


@pytest.mark.parametrize(("name", "call"), CASES)
def test_survives_compile(name: str, call: Call) -> None:
    args, kwargs = _detached(call)
    module = _Module(OPS[name].overload, kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*_detached(call)[0]), module(*args))
