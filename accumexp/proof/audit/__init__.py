"""The audit: a trainer with N micro-batches against itself with one, both watched by hooks."""

from .audit import audit

__all__ = ["audit"]
