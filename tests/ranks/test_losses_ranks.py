"""Law 11 between real processes: the shipped losses on two ranks, replicated and fully sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from accumexp.accum import Recovery, Window, data_parallel, fully_sharded, map_tensors, rank_share

from ..support.losses import CASES, SAMPLES, reference
from ..support.ranks import on_ranks
from ..support.reference import relative_error

STEPS = (1, 2, 3, 8)
SEVERAL = ["balance", "routed tokens", "three terms"]


def shares(steps: int, samples: int) -> list[int]:
    return [k for part in rank_share(samples, steps, dist.get_rank(), dist.get_world_size()) for k in part]


def windows(how: str) -> dict[tuple[str, int], tuple[dict[str, Tensor], float]]:
    """Gradient and loss of a window of every case and number of steps."""
    results = {}
    for name, case in CASES.items():
        for steps in STEPS:
            model = case.model()
            wrapped = fully_sharded(model, torch.device("cpu")) if how == "sharded" else data_parallel(model)
            window = Window(wrapped, case.loss, steps)
            rows = shares(steps, SAMPLES)
            inputs, targets = (map_tensors(lambda t, rows=rows: t[rows], part) for part in case.batch())
            backward = Recovery(window).backward if how == "recovered" else window.backward
            result = backward(inputs, targets)
            named = wrapped.module if isinstance(wrapped, nn.parallel.DistributedDataParallel) else wrapped
            whole: dict[str, Any] = {key: p.grad for key, p in named.named_parameters()}
            gradients = {
                key: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for key, g in whole.items()
            }
            terms = {k: float(v) for k, v in result.terms.items()}
            results[name, steps] = gradients, float(result.loss), terms
    return results


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(2, tmp_path_factory.mktemp("replicated"), windows, "replicated")


def check(results: list[Any], name: str) -> None:
    expected, value = reference(CASES[name])
    bound = 1e-12 if CASES[name].passes == 1 else 1e-10
    for rank in results:
        for steps in STEPS:
            gradients, loss, terms = rank[name, steps]
            assert relative_error(gradients, expected) <= bound, steps
            assert loss == pytest.approx(value, rel=1e-12)
            assert len(terms) == {"balance": 2}.get(name, 3 if name in SEVERAL else 0)
            assert not terms or sum(terms.values()) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_law_11_two_ranks_are_the_whole_batch(replicated: list[Any], name: str) -> None:
    check(replicated, name)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sharded", "recovered"])
def test_law_11_holds_for_shards_and_recovered_windows(tmp_path: Path, how: str) -> None:
    results = on_ranks(2, tmp_path, windows, how)
    for name in CASES:
        check(results, name)
