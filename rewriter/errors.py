"""The errors users meet. Each names the field, the value given and what is allowed."""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "CaptureError",
    "ConfigError",
    "ExportError",
    "InputError",
    "ModelError",
    "RewriteError",
    "RewriterError",
    "SourceError",
    "VerificationError",
]


class RewriterError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(RewriterError):
    """A pass name, a knob or an option has a value that is not allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}={value!r} is not allowed: {allowed}")
        self.field, self.value, self.allowed = field, value, allowed


class ModelError(RewriterError):
    """A model could not be found, read or built."""


class CaptureError(RewriterError):
    """A model could not be traced; names the operator and the source line."""


class InputError(RewriterError):
    """A tensor handed to the optimized model has the wrong dtype, shape or range."""


class RewriteError(RewriterError):
    """A rewrite left the program malformed (lint, shape or dtype), or strict mode found no match."""


class VerificationError(RewriterError):
    """Verification could not be carried out, or `strict` forbids the rollback it asks for."""


class ArtifactError(RewriterError):
    """A saved program is missing, damaged, or of an unknown version."""


class ExportError(RewriterError):
    """A program cannot be written in the format asked for; names the operator or option and why."""


class SourceError(RewriterError):
    """A package of the IR dataset could not be fetched or built; says which step and why."""
