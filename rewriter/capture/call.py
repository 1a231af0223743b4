"""One example call of a model, flattened: named tensors, constants, and the way back."""

from __future__ import annotations

import builtins
import inspect
import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rewriter.errors import ConfigError

__all__ = ["Call", "flatten_call"]


@dataclass(frozen=True)
class Call:
    """Example inputs as flat, named tensors.

    Attributes:
        parameters: names of the forward parameters given, in order.
        names: for each leaf of `in_spec` the tensor's name, or None for a constant.
        leaves: the example leaves, in the same order.
        in_spec: pytree spec of `(args, kwargs)`.
    """

    parameters: tuple[str, ...]
    names: tuple[str | None, ...]
    paths: tuple[str, ...]
    leaves: tuple[Any, ...]
    in_spec: pytree.TreeSpec

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The example tensors by name, in order."""
        named = zip(self.names, self.leaves, strict=True)
        return {name: leaf for name, leaf in named if name is not None}

    @property
    def constants(self) -> dict[str, Any]:
        """The arguments that are not tensors, by their path."""
        rows = zip(self.names, self.paths, self.leaves, strict=True)
        return {path: leaf for name, path, leaf in rows if name is None}

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` of the model with these tensors in place of the example's."""
        given = iter(tensors)
        named = zip(self.names, self.leaves, strict=True)
        leaves = [leaf if name is None else next(given) for name, leaf in named]
        return pytree.tree_unflatten(leaves, self.in_spec)

    def widened(self) -> Call:
        """A call with two rows where the example has one: tracing specialises on size 1."""
        sizes = {tensor.shape[0] for tensor in self.tensors.values() if tensor.dim()}
        if sizes != {1}:
            return self
        leaves = [
            leaf.repeat_interleave(2, dim=0) if isinstance(leaf, Tensor) and leaf.dim() else leaf
            for leaf in self.leaves
        ]
        return replace(self, leaves=tuple(leaves))


def flatten_call(model: nn.Module, example_inputs: object) -> Call:
    """Bind example inputs to `model.forward` and flatten them.

    Args:
        example_inputs: a tuple or list of positional arguments, a mapping of keyword ones, or a
            single tensor.

    Raises:
        ConfigError: they are of another kind, do not fit the signature, or hold no tensor.
    """
    args, kwargs = _split(example_inputs)
    parameters = _parameters(model, args, kwargs)
    leaves, in_spec = pytree.tree_flatten((args, kwargs))
    keys = [path for path, _ in pytree.tree_flatten_with_path((args, kwargs))[0]]
    paths = tuple(_path_name(key, parameters) for key in keys)
    names = tuple(
        _legal(path) if isinstance(leaf, Tensor) else None
        for path, leaf in zip(paths, leaves, strict=True)
    )
    if not any(names):
        raise ConfigError(
            "example_inputs", type(example_inputs).__name__, "needs at least one tensor"
        )
    return Call(parameters, names, paths, tuple(leaves), in_spec)


def _split(example_inputs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    allowed = "a tuple of positional arguments or a dict of keyword arguments"
    raise ConfigError("example_inputs", type(example_inputs).__name__, allowed)


def _parameters(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """The forward parameters that the example gives. Raises ConfigError where they do not fit."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        allowed = f"forward takes ({', '.join(signature.parameters)})"
        raise ConfigError("example_inputs", str(error), allowed) from None
    names: list[str] = []
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{name}_{i}" for i in range(len(value))]
        elif kind is inspect.Parameter.VAR_KEYWORD:
            names += list(value)
        else:
            names.append(name)
    return tuple(names)


def _path_name(path: tuple[Any, ...], parameters: tuple[str, ...]) -> str:
    """A placeholder name for a leaf: its parameter, then the keys inside it, e.g. `images_0`."""
    top, argument, *inner = path
    is_positional = top.idx == 0
    first = parameters[argument.idx] if is_positional else argument.key
    keys = [
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in inner
    ]
    return re.sub(r"\W", "_", "_".join([str(first), *keys]))


def _legal(name: str) -> str:
    """A name that a graph may give a placeholder: no built-in's and no keyword, such as `input`."""
    taken = keyword.iskeyword(name) or hasattr(builtins, name)
    return f"{name}_" if taken else name
