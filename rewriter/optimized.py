"""What `optimize` gives back: used like the model it came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rewriter.capture.guards import demand
from rewriter.decoding.derive import logits_index
from rewriter.decoding.new_tokens import check_tokens
from rewriter.decoding.state import Session
from rewriter.decoding.token_call import TokenCall, decode_call, whole_call
from rewriter.errors import InputError
from rewriter.lowering import lower
from rewriter.program import InputSpec, Program
from rewriter.report.report import Report

__all__ = ["OptimizedModel"]


class OptimizedModel(nn.Module):
    """A program with its report; inference only.

    Args:
        program: what is computed; with `decoding` it also generates.
        report: what was done and what was not.
        config: the model's `config.json` as a dict; None for a plain module.
        generation_config: its `generation_config.json` as a dict.
        backend: "eager", "inductor", "cpu" or "triton".
        source_directory: where the model was read from, for its tokenizer files.
    """

    def __init__(
        self,
        program: Program,
        report: Report,
        *,
        config: dict[str, Any] | None = None,
        generation_config: dict[str, Any] | None = None,
        backend: str = "eager",
        source_directory: Path | None = None,
    ) -> None:
        super().__init__()
        self.module = program.module
        self.program, self.report = program, report
        self.config, self.generation_config = config, generation_config
        self.backend, self.source_directory = backend, source_directory
        self.run: Callable[..., Any] = lower(program, backend)
        self.train(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> OptimizedModel:
        """Move or cast the weights, and bind the new ones."""
        super()._apply(fn, recurse)
        self.run = lower(self.program, self.backend)
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of `nn.Module`; also where it puts new tensors in the place of the weights."""
        keys = super().load_state_dict(*args, **kwargs)
        self.run = lower(self.program, self.backend)
        return keys

    def session(
        self, batch_size: int, *, capacity: int | None = None, prefill_chunk: int | None = None
    ) -> Session:
        """Fresh decoding state for a batch. Raises InputError on a program without decoding."""
        return Session(
            self.program, batch_size, capacity=capacity, run=self.run, prefill_chunk=prefill_chunk
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own signature and outputs; of a language model without a cache.

        A language model takes `input_ids`, and by name `attention_mask`, `position_ids`,
        `logits_to_keep` and `return_dict`. Where padding leaves the positions open and they matter,
        they have to be given.

        Raises:
            InputError: names what is wrong and what is allowed.
        """
        with torch.no_grad():
            if self._reads_tokens:
                return self._forward_tokens(*args, **kwargs)
            values = self._flat_inputs(args, kwargs)
            return self._structured(self.run(*values))

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's `generate`: the same arguments, the same loop.

        Args:
            args, kwargs: as of `transformers.GenerationMixin.generate`: first `inputs` (also called
                `input_ids`), int64 [batch_size, prompt length], left padded if `attention_mask`
                says so.

        Raises:
            InputError: the program cannot decode, or cannot do what is asked for.
        """
        from transformers import GenerationConfig

        from rewriter.decoding.generate import Generator, config_from_dict

        if self.program.decoding is None or self.config is None:
            reason = self.report.decoding or "it is not a causal language model"
            raise InputError(f"this program cannot generate: {reason}")
        prompt = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if prompt is not None:
            check_tokens(prompt, None, self.program.meta.get("vocab_size"))
        defaults = GenerationConfig(**(self.generation_config or {}))
        generator = Generator(self, config_from_dict(self.config), defaults)
        return generator.generate(*args, **kwargs)

    def save(self, directory: str | Path) -> None:
        """Write a directory that `rewriter.load` reads: safetensors and JSON, all or nothing."""
        from rewriter.export.artifact import save_optimized

        save_optimized(self, Path(directory))

    def export(self, path: str | Path, **options: Any) -> Any:
        """Write an artifact that runs without this process, checked beside this program first.

        Args:
            path: "m.pt2" for AOTInductor, "m.onnx" for ONNX Runtime (weights in "m.onnx.data"), any
                other name for a directory with `model.onnx`, configuration and tokenizer.
            options: by name. Of ONNX: `ep` ("portable", "cpu" or "cuda"), `logits` ("last" or "all"),
                `dtype`. Of .pt2: `target`, `batch`, `portable`. Of both: `max_length`. As of
                `rewriter.export.onnx_export.export_onnx` and `rewriter.export.pt2.export_pt2`;
                `on_stage` is called with the name of each stage as it starts.

        Returns:
            what was written: sizes, operators, seconds.

        Raises:
            ConfigError: an option that the format does not have, or a wrong value.
            ExportError: a part of the program that the format cannot express.
            VerificationError: the artifact computes something else; nothing is left behind.
            ArtifactError: the place cannot be written.
        """
        from rewriter.export.formats import export_optimized

        return export_optimized(self, Path(path), **options)

    @property
    def _reads_tokens(self) -> bool:
        program = self.program
        return program.decoding is not None or program.meta.get("kind") == "causal_lm"

    def _forward_tokens(self, *args: Any, **kwargs: Any) -> Any:
        call = TokenCall.parse(args, kwargs, self.program.signature.constants)
        if self.program.decoding is not None:
            outputs = decode_call(call, lambda rows, room: self.session(rows, capacity=room))
        else:
            named = whole_call(self.program, call)
            outputs = list(self.run(*(named[spec.name] for spec in self.program.signature.inputs)))
            which = logits_index(self.program)
            outputs[which] = outputs[which][:, -call.logits_to_keep :]
        result = self._structured(outputs)
        return result if call.return_dict or isinstance(result, tuple) else result.to_tuple()

    def _structured(self, outputs: Any) -> Any:
        return pytree.tree_unflatten(list(outputs), self.program.signature.out_spec)

    def _flat_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors of a call in placeholder order, checked against the signature."""
        signature = self.program.signature
        named = dict(zip(signature.parameters, args, strict=False)) | kwargs
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != signature.in_spec:
            leaves = self._reordered(args, named)
        for name, fixed in signature.constants.items():
            if name in named and not _equal(named[name], fixed):
                raise InputError(f"{name}={named[name]!r}; allowed: {fixed!r}, as captured")
        by_name = {
            name: leaf
            for name, leaf in zip(signature.leaf_names, leaves, strict=True)
            if name is not None
        }
        checked = {spec.name: self._checked(spec, by_name[spec.name]) for spec in signature.inputs}
        demand(self.program.meta["guards"], checked)
        return list(checked.values())

    def _reordered(self, args: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
        """Leaves in the captured order, when positional and keyword arguments were mixed otherwise."""
        signature = self.program.signature
        unknown = sorted(set(named) - set(signature.parameters))
        missing = [
            n for n in signature.parameters if n not in named and n not in signature.constants
        ]
        if unknown or missing or len(args) > len(signature.parameters):
            wrong = f"unexpected {unknown}" if unknown else f"missing {missing}"
            allowed = ", ".join(signature.parameters)
            raise InputError(f"inputs differ from those captured ({wrong}); allowed: {allowed}")
        values = [named.get(n, signature.constants.get(n)) for n in signature.parameters]
        leaves = pytree.tree_leaves(values)
        if len(leaves) != len(signature.leaf_names):
            raise InputError(
                f"{len(leaves)} input values; allowed: {len(signature.leaf_names)}, as captured"
            )
        return leaves

    def _checked(self, spec: InputSpec, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise InputError(f"{spec.name} is {type(value).__name__}; allowed: a tensor")
        self._check_dtype(spec.name, value, spec.dtype)
        fixed = [dim if isinstance(dim, int) else None for dim in spec.dims]
        fits = len(fixed) == value.dim() and all(
            want is None or want == got for want, got in zip(fixed, value.shape, strict=True)
        )
        if not fits:
            allowed = [str(dim) for dim in spec.dims]
            raise InputError(f"{spec.name} has shape {list(value.shape)}; allowed: {allowed}")
        return value

    @staticmethod
    def _check_dtype(name: str, value: Tensor, dtype: torch.dtype) -> None:
        allowed = {dtype, torch.int32} if dtype == torch.int64 else {dtype}
        if value.dtype not in allowed:
            raise InputError(f"{name} has dtype {value.dtype}; allowed: {dtype}")


def _equal(value: object, fixed: object) -> bool:
    return value is fixed or (not isinstance(value, Tensor) and value == fixed)
