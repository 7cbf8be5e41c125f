"""What the YAML files use beside values: the schema, and the resolvers of expressions. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from ..config.schema import Config, Strategy
from ..config.sizes import AUTO, batch_sizes, processes
from ..errors import UsageError
from ..sweeps.hydra_sweep import typed_overrides
from ..sweeps.job_folders import job_folder_name, slug

MICRO_BATCH_SIZE = "${micro_batch_size:}"

RATES: dict[str, Callable[[float], float]] = {
    "linear": lambda ratio: ratio,  # Goyal et al., arXiv 1706.02677
    "sqrt": math.sqrt,  # Krizhevsky, arXiv 1404.5997
}


def _scaled_rate(rate: float, reference: int, batch: int | None, rule: str) -> float:
    """The learning rate for updates of `batch` samples, where `rate` is that for `reference` samples."""
    if rule not in RATES:
        raise ValueError(f"{rule}: no rule for a learning rate, known are {', '.join(RATES)}")
    if batch is None:
        raise ValueError("a learning rate is to follow from the batch size, give data.batch_size=...")
    return rate * RATES[rule](batch / reference)


def _micro_batch_size(*, _root_: DictConfig) -> int | str | None:
    """`accum.micro_batch_size`, given or derived from the batch, the steps and the ranks.

    None if they disagree: `config.validation.complete` then raises. With `accum.steps=auto` the interpolation
    stays until there is a number (`config.loading.with_steps`).
    """
    data, accum = _root_.data, _root_.accum
    try:
        ranks = processes(accum.processes, accum.strategy is Strategy.standalone, _root_.device)
        _, steps, micro = batch_sizes(data.batch_size, accum.steps, accum.micro_batch_size, ranks)
        return MICRO_BATCH_SIZE if steps == AUTO else micro
    except UsageError:
        return None


def _place(sweep: str, launch: int, number: int, name: str, overrides: Any, *, _root_: DictConfig) -> str:
    """`job_folder_name` for the overrides as they were typed: resolved, they may hold secrets."""
    job: Any = OmegaConf.to_container(_root_.hydra.job, resolve=False)
    typed, _ = typed_overrides(_root_.hydra)
    if any("${" in one for one in typed):
        name = slug(job["override_dirname"])
    return job_folder_name(sweep, launch, number, name, typed)


RESOLVERS: dict[str, Callable[..., Any]] = {
    "slug": slug,
    "place": _place,
    "product": lambda *factors: math.prod(int(factor) for factor in factors),
    "scaled_rate": _scaled_rate,
    "folders": lambda root: sum(entry.is_dir() for entry in Path(root).glob("*")),
    "micro_batch_size": _micro_batch_size,
}
for name, resolver in RESOLVERS.items():
    OmegaConf.register_new_resolver(name, resolver, replace=True)
ConfigStore.instance().store(name="schema", node=Config)
