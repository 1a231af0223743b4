"""A program saved by torch.export, as a module that capture takes without tracing it again."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.export import ExportedProgram

from rewriter.capture.baked import dynamic_dims
from rewriter.capture.call import Call
from rewriter.capture.trace import Trace

__all__ = ["ExportedModule"]


class ExportedModule(nn.Module):
    """Runs an exported program; its dynamic dimensions are those it was exported with."""

    def __init__(self, exported: ExportedProgram) -> None:
        super().__init__()
        self.exported = exported
        self.inner = exported.module()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the exported model returns."""
        return self.inner(*args, **kwargs)

    def call(self) -> Call:
        """The call that the program was exported with, without example tensors."""
        in_spec: Any = self.exported.call_spec.in_spec
        names = tuple(self._input_names())
        args_spec, kwargs_spec = in_spec.children()
        positional = [f"input_{i}" for i in range(len(args_spec.children()))]
        parameters = (*positional, *(kwargs_spec.context or ()))
        constants = [spec.arg for spec in self._user_inputs()]
        leaves = tuple(getattr(argument, "value", None) for argument in constants)
        paths = tuple(name or f"constant_{i}" for i, name in enumerate(names))
        return Call(parameters, names, paths, leaves, in_spec)

    def trace(self) -> Trace:
        """The program as it is; whatever it fixed stays fixed."""
        values = {n.name: n.meta["val"] for n in self.exported.graph.find_nodes(op="placeholder")}
        names = tuple(self._input_names())
        tensors = {name: values[name] for name in names if name is not None}
        asked = dynamic_dims(tensors, ("batch", "seq"))
        return Trace(self.exported, names, asked, {}, "fixed in the exported program", 0.0)

    def _user_inputs(self) -> list[Any]:
        specs = self.exported.graph_signature.input_specs
        return [spec for spec in specs if spec.kind.name == "USER_INPUT"]

    def _input_names(self) -> list[str | None]:
        """Names of the tensor inputs in order; None for a constant."""
        arguments = [spec.arg for spec in self._user_inputs()]
        return [None if hasattr(argument, "value") else argument.name for argument in arguments]
