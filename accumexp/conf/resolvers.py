"""What the YAML files use beside values: the schema, and the resolvers of expressions. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from ..config.schema import Config, Strategy
from ..config.sizes import AUTO, batch_sizes, processes
from ..errors import UsageError
from ..sweeps.job_folders import job_folder_name, slug

MICRO_BATCH_SIZE = "${micro_batch_size:}"


def _job_folder(sweep: str, launch: int, number: int, name: str, overrides: Sequence[str]) -> str:
    return job_folder_name(sweep, launch, number, name, list(overrides))


def _product(*factors: int) -> int:
    result = 1
    for factor in factors:
        result *= int(factor)
    return result


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


def _folders(root: str) -> int:
    path = Path(root)
    return sum(entry.is_dir() for entry in path.iterdir()) if path.is_dir() else 0


def _micro_batch_size(*, _root_: DictConfig) -> int | str | None:
    """`accum.micro_batch_size` of the whole configuration, where it follows from the others too.

    None where they disagree: `config.check` then says so. With `accum.steps=auto` it stays the question
    that it is, to be answered when there is a number (`config.settled`).
    """
    data, accum = _root_.data, _root_.accum
    try:
        ranks = processes(accum.processes, accum.strategy is Strategy.standalone, _root_.device)
        _, steps, micro = batch_sizes(data.batch_size, accum.steps, accum.micro_batch_size, ranks)
        return MICRO_BATCH_SIZE if steps == AUTO else micro
    except UsageError:
        return None


OmegaConf.register_new_resolver("slug", slug, replace=True)
OmegaConf.register_new_resolver("place", _job_folder, replace=True)
OmegaConf.register_new_resolver("product", _product, replace=True)
OmegaConf.register_new_resolver("scaled_rate", _scaled_rate, replace=True)
OmegaConf.register_new_resolver("folders", _folders, replace=True)
OmegaConf.register_new_resolver("micro_batch_size", _micro_batch_size, replace=True)
ConfigStore.instance().store(name="schema", node=Config)
