"""int8 weights with one scale for each output row; activations stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, fx, nn

from rewriter.cost.work import Work, dtype_name, linear_work
from rewriter.dialect import OPS
from rewriter.dialect.int8 import quantize_rows
from rewriter.dialect.linear import linear
from rewriter.engine.miss import Miss
from rewriter.engine.rewrite_pass import Facts, Fidelity, RewritePass
from rewriter.engine.site import Site, bound_arguments
from rewriter.errors import ConfigError

__all__ = ["Int8Weights", "Matrix", "ProductFacts"]

aten = torch.ops.aten

WEIGHTS = {"linear": ("weight",), "gated_mlp": ("gate", "up", "down"), "mlp": ("up", "down")}
"""Arguments of each product that are weights [out, in]."""


@dataclass(frozen=True)
class Matrix:
    """A weight of a product: the argument that it is, the parameter's path, and its value [out, in]."""

    argument: str
    path: str
    value: Tensor


@dataclass(frozen=True)
class ProductFacts(Facts):
    """The weights that may become int8, and the names of the arguments whose values vary."""

    op: str
    matrices: tuple[Matrix, ...]
    others: tuple[str, ...]
    options: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Int8Weights(RewritePass):
    """Weights of products as int8 rows with one fp32 scale each.

    What it does:
        Stores the weights of linear layers and feed-forward blocks as int8 [out, in], symmetric, the
        largest magnitude of each row being 127, beside an fp32 scale for each row. The original
        weight is not part of the program any more. A table of embeddings that is also the last
        matrix (tied) becomes one int8 table for both; its rows are made wide as they are looked up.
    Applies when:
        The weight is a parameter, or its transpose, that nothing but products and look-ups read.
    Does not:
        Quantise activations, keys or values, experts, norms, or tables that are only looked up in.
    Shapes:
        x [..., in] float32 or bfloat16, weight [out, in] of x's dtype.
    Numerics:
        Approximate: a weight moves by at most 1/254 of the largest in its row. Sums are fp32 and
        scaled once at their end. Equal to the original at `max_error=0`.
    Cost:
        A decode step reads a quarter of the bytes of fp32 weights, half of those of bf16. `cpu`
        multiplies int8 rows in registers; `eager` and `inductor` make some rows wide at a time,
        which long prompts pay for once a call.
    Parameters:
        max_error: mean error over mean magnitude up to which a matrix is quantised; normally
            distributed weights have about 0.01, outliers make it larger. 0 leaves everything.
        min_elements: smaller matrices stay as they are.
        skip: parts of parameter paths joined with `+`, such as `lm_head+down_proj`; what has one of
            them in its path stays as it is.
        layers: the layers it may touch; None = all.
    Raises:
        ConfigError: a knob out of range.
    Source:
        https://arxiv.org/abs/2208.07339
    """

    name: ClassVar[str] = "int8-weights"
    fidelity: ClassVar[Fidelity] = Fidelity.APPROXIMATE
    source: ClassVar[str] = "https://arxiv.org/abs/2208.07339"
    anchor: ClassVar[str] = "product"

    max_error: float = 0.05
    min_elements: int = 4096
    skip: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.max_error <= 1:
            raise ConfigError("max_error", self.max_error, "0 to 1")
        if self.min_elements < 1:
            raise ConfigError("min_elements", self.min_elements, "an integer of at least 1")

    def check(self, site: Site) -> ProductFacts | Miss:
        """At least one weight that may become int8."""
        assert site.node is not None
        values, found = site.arguments, list[Matrix]()
        reason = ""
        for argument in WEIGHTS[site.op]:
            matrix = self._matrix(site, argument, values[argument])
            if isinstance(matrix, Matrix):
                found.append(matrix)
            else:
                reason = reason or matrix
        if not found:
            return Miss.at(site.node, self.name, reason, site=site.label)
        own = {matrix.argument for matrix in found}
        tensors = tuple(n for n, v in values.items() if _may_be_tensor(v) and n not in own)
        options = {n: v for n, v in values.items() if n not in own and n not in tensors}
        return ProductFacts(site.op, tuple(found), tensors, options)

    def _matrix(self, site: Site, argument: str, node: Any) -> Matrix | str:
        """A weight that may become int8, or why it may not."""
        held = _parameter(node)
        if held is None:
            return f"{argument} is no parameter"
        path = str(held.target)
        weight = attrgetter(path)(site.program.module)
        value = (weight if held is node else weight.t()).detach()
        if value.dim() != 2 or value.dtype not in (torch.float32, torch.bfloat16):
            return f"{path} is {value.dtype} {list(value.shape)}: a float32 or bfloat16 matrix"
        if value.numel() < self.min_elements:
            return f"{path} has {value.numel()} elements: at least {self.min_elements}"
        if any(part in path for part in self.skip.split("+") if part):
            return f"{path} is among those to skip: {self.skip}"
        if other := next(_other_readers(held), None):
            return f"{path} is read by {other.name}, which is no product with it"
        if not bool(value.isfinite().all()):
            return f"{path} has infinite values"
        return Matrix(argument, path, value)

    def rewrite(self, graph: fx.Graph, site: Site, facts: ProductFacts) -> None:
        """Each weight becomes `dequantize_rows` of two new buffers; backends multiply without it."""
        assert site.node is not None
        for matrix in facts.matrices:
            if (found := self._quantized(matrix)) is None:
                continue
            old = site.arguments[matrix.argument]
            held = _parameter(old)
            assert held is not None
            rows = _buffers(graph, site, held, matrix.path, found)
            dtype: dict[str, Any] = {"dtype": matrix.value.dtype}
            with graph.inserting_before(site.node):
                wide = graph.call_function(OPS["dequantize_rows"].overload, rows, dtype)
            site.node.replace_input_with(old, wide)
            for reader in list(held.users):
                if reader.target is aten.embedding.default and held is old:
                    reader.target, reader.kwargs = OPS["int8_embedding"].overload, dtype
                    reader.args = (*rows, reader.args[1])
            _drop(graph, site, old, held)

    def _quantized(self, matrix: Matrix) -> tuple[Tensor, Tensor] | None:
        """int8 rows and scales, or None where they would be too far off."""
        if self.max_error == 0:
            return None
        rows, scale = quantize_rows(matrix.value)
        return (rows, scale) if _error(matrix.value, rows, scale) <= self.max_error else None

    def reference_inputs(self, site: Site, facts: ProductFacts) -> tuple[fx.Node | None, ...]:
        """What is multiplied, and the biases; the weights are facts."""
        return tuple(site.arguments[name] for name in facts.others)

    def reference(self, *tensors: Tensor | None, facts: ProductFacts) -> Tensor:
        """The product with weights that are int8 and back."""
        values = dict(zip(facts.others, tensors, strict=True))
        x = tensors[0]
        assert x is not None
        for matrix in facts.matrices:
            found = self._quantized(matrix)
            wide = matrix.value if found is None else _dequantized(*found, x.dtype)
            values[matrix.argument] = wide.to(x.dtype)
        if facts.op == "linear":
            return linear(*values_of(values, "input", "weight", "bias"))  # pyright: ignore
        return OPS[facts.op].reference(**values, **facts.options)

    def exact_setting(self, facts: ProductFacts, *, length: int) -> Self:
        """No error is small enough."""
        return replace(self, max_error=0.0)

    def stress_setting(self, facts: ProductFacts, *, length: int) -> Self:
        """Every matrix, whatever its error; as asked for where that is so already."""
        return self if self.max_error >= 0.05 else replace(self, max_error=1.0)

    def original_work(self, facts: ProductFacts) -> tuple[Work, ...]:
        """A product with each weight that may become int8."""
        return tuple(_product(m, dtype_name(m.value.dtype)) for m in facts.matrices)

    def work(self, facts: ProductFacts) -> tuple[Work, ...]:
        """The same with int8 rows."""
        return tuple(_product(matrix, "int8") for matrix in facts.matrices)

    def candidates(self, facts: ProductFacts) -> tuple[Self, ...]:
        """Everything, and all but the last matrix."""
        return (self, replace(self, skip="lm_head"))


def values_of(values: dict[str, Any], *names: str) -> list[Any]:
    """In this order; None for what is not there."""
    return [values.get(name) for name in names]


def _product(matrix: Matrix, weight_dtype: str) -> Work:
    """Of one vector, which has the dtype that the weight had."""
    dtype = dtype_name(matrix.value.dtype)
    out_size, in_size = matrix.value.shape
    return linear_work(1, out_size, in_size, dtype, weight_dtype)


def _may_be_tensor(value: Any) -> bool:
    return value is None or isinstance(value, fx.Node)


def _parameter(node: Any) -> fx.Node | None:
    """The attribute that a weight is, or whose transpose it is."""
    if isinstance(node, fx.Node) and node.target is aten.t.default:
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _other_readers(held: fx.Node) -> Iterator[fx.Node]:
    """Who reads a parameter as anything but a weight, its transpose, or a table of embeddings."""
    for reader in held.users:
        if reader.target is aten.t.default:
            yield from (n for n in reader.users if not _multiplies(n, reader))
        elif reader.target is aten.embedding.default:
            if len(reader.args) != 2 and any(reader.args[3:]):  # scaled by frequency, or sparse
                yield reader
        elif not _multiplies(reader, held):
            yield reader


def _multiplies(reader: fx.Node, weight: fx.Node) -> bool:
    """Whether a node reads another only as its weight."""
    name = getattr(reader.target, "_opname", "")
    if reader.op != "call_function" or name not in WEIGHTS:
        return False
    read = {argument for argument, value in bound_arguments(reader).items() if value is weight}
    return read <= set(WEIGHTS[name])


def _error(weight: Tensor, rows: Tensor, scale: Tensor) -> float:
    """Of magnitudes: the norm of a matrix with outliers would be theirs alone. In blocks, for the cache."""
    wrong = total = 0.0
    step = max(1, 2**20 // weight.shape[1])
    for part, narrow, factor in zip(*(t.split(step) for t in (weight, rows, scale)), strict=True):
        wide = part.float()
        total += float(wide.abs().sum())
        wrong += float((narrow.float().mul_(factor[:, None]) - wide).abs_().sum())
    return wrong / total if total else 0.0


def _dequantized(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return OPS["dequantize_rows"].reference(rows, scale, dtype=dtype)


def _buffers(
    graph: fx.Graph, site: Site, held: fx.Node, path: str, found: tuple[Tensor, Tensor]
) -> tuple[fx.Node, fx.Node]:
    """Nodes of the int8 rows and their scales; the ones there are where another product made them."""
    owner_path, _, leaf = path.rpartition(".")
    owner: nn.Module = site.program.module.get_submodule(owner_path)
    nodes = list[fx.Node]()
    for kind, value in zip(("int8", "scale"), found, strict=True):
        name = f"{leaf}_{kind}"
        full = f"{owner_path}.{name}".lstrip(".")
        there = [n for n in graph.find_nodes(op="get_attr") if n.target == full]
        if not there:
            owner.register_buffer(name, value)
            with graph.inserting_before(held):
                there = [graph.get_attr(full)]
        nodes.append(there[0])
    return nodes[0], nodes[1]


def _drop(graph: fx.Graph, site: Site, old: fx.Node, held: fx.Node) -> None:
    """Take out a weight that nothing reads any more, and its memory."""
    if not old.users:
        graph.erase_node(old)
    if held is not old and not held.users:
        graph.erase_node(held)
    path = str(held.target)
    if not any(node.target == path for node in graph.find_nodes(op="get_attr")):
        owner, _, leaf = path.rpartition(".")
        delattr(site.program.module.get_submodule(owner), leaf)
