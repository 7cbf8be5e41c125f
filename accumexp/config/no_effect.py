"""Settings that the rest of a configuration leaves without effect."""

from __future__ import annotations

from typing import Any

from .loading import flatten
from .schema import Config, LossScaling, Precision, Strategy

GROWTH = [f"accum.{name}" for name in ("growth_factor", "backoff_factor", "growth_interval", "min_scale")]


def no_effect(config: Config) -> dict[str, str]:
    """{dotted key: why} of the settings that are not read with the others as they are."""
    accum = config.accum
    reasons: dict[str, str] = {}
    if accum.loss_scale is LossScaling.none:
        reasons |= dict.fromkeys(["accum.init_scale", *GROWTH], "accum.loss_scale=none")
    elif accum.loss_scale is LossScaling.static:
        reasons |= dict.fromkeys(GROWTH, "accum.loss_scale=static")
    if accum.strategy is not Strategy.ddp:
        reasons["accum.find_unused_parameters"] = f"accum.strategy={accum.strategy.name}"
    if config.param_precision not in (Precision.bf16, Precision.fp16):
        reasons["accum.fp32_buffers"] = "parameters of full precision"
    if config.data.eval:
        reasons["data.eval_fraction"] = "a data.eval of its own"
    return reasons


def no_effect_lines(config: Config) -> list[str]:
    """A line for every setting that differs from its default without effect."""
    given, default = dict(flatten(config)), dict(flatten(Config()))
    return [
        f"{key}={_text(given[key])}: has no effect with {reason}"
        for key, reason in no_effect(config).items()
        if given[key] != default[key]
    ]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
