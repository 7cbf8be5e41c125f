"""Why a window cannot be the larger batch, found while it computes. Commands report these in one line."""

from __future__ import annotations


class Refused(ValueError):
    """Base of the refusals. `key` is the part of a configuration that is at fault."""

    key = ""


class LossRefused(Refused):
    """Of a loss."""

    key = "loss"


class ModelRefused(Refused, RuntimeError):
    """Of a model. A fault of its passes is a RuntimeError as well."""

    key = "model"
