"""A compiled model is proved as it runs: hooks fire, graphs are used again, and its faults are found."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from accumexp.accum.batch import split_sizes
from accumexp.environment.ranks import RankInfo
from accumexp.errors import TrainingError
from accumexp.proof import Certificate, certify
from accumexp.proof.compilation import compile_forward
from accumexp.proof.fixed_draws import fixed_draws
from accumexp.prove.experiment import prove_experiment

from ..support.experiments import composed

CLASSES = 5
LAST_BIAS = "last.bias"


class Kept(torch.autograd.Function):
    """Gives a bias's gradient in memory that the next backward writes over.

    So does a recorded graph whose output autograd takes over as `.grad`: of four micro-batches the bias keeps
    the last one, a quarter of its gradient (https://github.com/pytorch/pytorch/issues/96693).
    """

    memory: dict[torch.Size, Tensor] = {}

    @staticmethod
    def forward(ctx: Any, bias: Tensor) -> Tensor:
        return bias.view_as(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return in_reused_memory(Kept.memory, gradients[0])


def in_reused_memory(memory: dict[torch.Size, Tensor], gradient: Tensor) -> Tensor:
    """`gradient` in new memory, after that of the one before was cleared for another use."""
    if gradient.shape in memory:
        memory[gradient.shape].zero_()
    memory[gradient.shape] = gradient.clone()
    return memory[gradient.shape].detach()


class Net(nn.Module):
    """Keeps a quarter of the last bias's gradient in fp32, if `faulty`."""

    def __init__(self, faulty: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.last = nn.Linear(9, CLASSES)
        self.faulty = faulty

    def forward(self, x: Tensor) -> Tensor:
        bias = self.last.bias
        if self.faulty and torch.is_grad_enabled() and bias.dtype is torch.float32:
            bias = Kept.apply(bias)
        return F.linear(self.first(x).relu(), self.last.weight, bias)


def loop(
    model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], steps: int, *, compiled: str = ""
) -> float:
    """A right loop; with `compiled` the model is compiled in fp32, with its hooks "outside" or "inside"."""
    inputs, targets = batch
    network: Any = model
    if compiled and next(model.parameters()).dtype is torch.float32:
        if compiled == "outside" and model._compiled_call_impl is None:
            compile_forward(model)
        elif compiled == "inside":
            network = torch.compile(model)
    steps = -(-len(inputs) * steps // 24)
    sizes = split_sizes(len(inputs), steps)
    total = 0.0
    for x, y in zip(inputs.split(sizes), targets.split(sizes), strict=True):
        value = F.cross_entropy(network(x), y, reduction="sum") / len(inputs)
        value.backward()
        total += float(value.detach())
    optimizer.step()
    optimizer.zero_grad()
    return total


def certified(train_window: Callable[..., Any], model: nn.Module) -> Certificate:
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(24, 6, generator=generator), torch.randint(0, CLASSES, (24,), generator=generator)
    return certify(train_window, model, nn.CrossEntropyLoss(), batch, 4, updates=3)


def assert_last_bias_fails(certificate: Certificate) -> None:
    assert not certificate.proved
    failed = {check.name: check for check in certificate.failed}
    assert "gradient, fp64" not in failed
    assert LAST_BIAS in failed["addition, fp32"].detail and LAST_BIAS in failed["gradient, fp32"].detail


def test_a_bias_that_keeps_its_last_micro_batch_in_the_runs_precision_is_named() -> None:
    torch.manual_seed(0)
    assert_last_bias_fails(certified(loop, Net(faulty=True)))


def faulty_backend(
    graph: Any, inputs: Any, generate: Callable[..., Any] | None = None, **options: Any
) -> Any:
    """Compiles, with `generate` if given, and reuses the memory of the gradient of `LAST_BIAS`."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func

    def forward(module: Any, examples: Any) -> Any:
        return make_boxed_func(module) if generate is None else generate(module, examples)

    def backward(module: Any, examples: Any) -> Any:
        memory: dict[torch.Size, Tensor] = {}
        compiled = forward(module, examples)

        def run(*arguments: Any) -> list[Any]:
            results = compiled(list(arguments))
            return [
                in_reused_memory(memory, r) if isinstance(r, Tensor) and r.shape == (CLASSES,) else r
                for r in results
            ]

        return make_boxed_func(run)

    return aot_autograd(fw_compiler=forward, bw_compiler=backward, **options)(graph, inputs)


def faulty_inductor(graph: Any, inputs: Any) -> Any:
    """torch's default backend with that fault."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    return faulty_backend(graph, inputs, compile_fx_inner, decompositions=select_decomp_table())


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Sets the backend of torch.compile."""
    torch.compiler.reset()

    def set_backend(backend: Any) -> None:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))

    return set_backend


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hooks", "right", "faulty"),
    [
        ("outside", "aot_eager", faulty_backend),
        ("inside", "aot_eager", faulty_backend),
        pytest.param(
            "outside",
            "inductor",
            faulty_inductor,
            marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
        ),
    ],
)
def test_a_compiled_model_whose_backward_reuses_memory_is_not_proved(
    hooks: str, right: str, faulty: Any, compiler: Callable[[Any], None]
) -> None:
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    compiled = functools.partial(loop, compiled=hooks)
    compiler(right)
    counters.clear()
    assert certified(compiled, Net()).proved
    assert counters["stats"]["unique_graphs"] and not counters["unimplemented"]  # no recompilation limit
    torch.compiler.reset()
    compiler(faulty)
    assert_last_bias_fails(certified(compiled, Net()))


@pytest.mark.slow
def test_hooks_run_outside_the_compiled_code_which_copies_share(compiler: Callable[[Any], None]) -> None:
    runs: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        def run(*arguments: Any) -> Any:
            runs.append(1)
            return graph(*arguments)

        return run

    compiler(counting)
    from torch._dynamo.utils import counters

    counters.clear()
    model = each = Net()
    calls: list[tuple[int, bool]] = []
    for _ in range(3):
        each = copy.deepcopy(model)
        compile_forward(each)
        for _ in range(12):  # more than torch's limit of recompilations
            with each.register_forward_pre_hook(
                lambda module, arguments: calls.append((len(arguments[0]), torch.compiler.is_compiling()))
            ):
                for size in (4, 3, 5):
                    each(torch.randn(size, 6)).sum().backward()
        assert "forward" not in each.__dict__ and copy.deepcopy(each)._compiled_call_impl is None
    assert calls == [(size, False) for size in (4, 3, 5)] * 36
    assert len(runs) == len(calls) and counters["stats"]["unique_graphs"] == 2  # one size, then any
    # With draws held fixed, the model runs eagerly.
    inputs = torch.randn(4, 6)
    with fixed_draws(each, (inputs, inputs), 0):
        each(inputs)
    assert len(runs) == len(calls)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_prove_compiles_as_the_run_does(precision: str, compiler: Callable[[Any], None]) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    compiler("aot_eager")
    options = ["device=cpu", "callbacks=none", "model=mlp", "accum.steps=4", "proof.updates=4"]
    config = composed(*options, "data.batch_size=32", f"precision={precision}", "trainer.compile=true")
    certificate, experiment = prove_experiment(config, RankInfo(), lambda stage: None)
    assert certificate.proved and certificate.subject["precision"] == f"compiled {precision}"
    assert counters["stats"]["unique_graphs"] > 0 and not counters["unimplemented"]
    assert experiment.model._compiled_call_impl is None  # the larger batch is eager
    if precision == "fp32":
        assert {"gradient, fp64", "gradient, compiled fp32"} <= {check.name for check in certificate.checks}


class TorchDynamoException(RuntimeError):
    """As torch names it, which takes seconds to import."""


@pytest.mark.slow
def test_a_model_that_cannot_be_compiled_ends_the_proof_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: nn.Module) -> None:
        raise TorchDynamoException("InvalidCxxCompiler: none was found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr("accumexp.prove.trainer_loop.compile_forward", fails)
    config = composed(
        "device=cpu", "callbacks=none", "model=mlp", "data.batch_size=32", "trainer.compile=true"
    )
    with pytest.raises(
        TrainingError, match="^trainer.compile=true: the model cannot be compiled: Inv.*found; leave"
    ):
        prove_experiment(config, RankInfo(), lambda stage: None)
