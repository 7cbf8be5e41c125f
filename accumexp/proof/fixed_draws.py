"""Random draws of a model, recorded by module and replaced by functions of the sample.

torch tags every operator that draws, so a dispatch mode receives all of them. Their results become a function
of the sample, the draw's position in the forward pass and a seed, independent of the micro-batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .module_tracker import OUTSIDE, ModuleTracker, in_backward, outside_transforms
from .problem import Problem, WholeBatch, forked_rng
from .sample_ids import SampleIds

# Operators that draw into or like their first argument.
REPLACED = ("native_dropout", "bernoulli", "bernoulli_", "exponential_", "uniform_", "normal_")


class FixedDraws(TorchDispatchMode):
    """While active, draws are functions of sample, position and seed.

    Attributes:
        operators: names of the operators that drew, by module.
        unfixed: those among them that cannot be replaced.
        shapes: of the draws, by position.
    """

    def __init__(self, modules: ModuleTracker, seed: int, sample_dims: Mapping[str, int | None]) -> None:
        super().__init__()
        self.modules = modules
        self.seed = seed
        self.sample_dims = sample_dims
        self.operators: dict[str, set[str]] = {}
        self.unfixed: set[str] = set()
        self.shapes: dict[str, torch.Size] = {}
        # Position and samples of each draw, by torch's generator before it.
        self._drawn: dict[bytes, tuple[str, list[int]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.modules.module == OUTSIDE and not in_backward():
            self.modules.follow(args)
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func.__name__.partition(".")[0]
        if name in ("native_dropout", "dropout") and (args[1] == 0 or args[2] is False):
            return func(*args, **kwargs)
        self.operators.setdefault(self.modules.module, set()).add(name)
        fixed = self._fixed(name, func, args, kwargs)
        if fixed is None:
            self.unfixed.add(name)
            return func(*args, **kwargs)
        return fixed

    def _fixed(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of operator `name` with fixed draws; None for an operator without a replacement."""
        if name in ("rand", "randn", "rand_like", "randn_like"):
            like = func(*args, **kwargs)
            drawn = self._uniform(like.shape, like.device)
            return (drawn if name in ("rand", "rand_like") else torch.special.ndtri(drawn)).to(like.dtype)
        if not args or not isinstance(args[0], Tensor) or name not in REPLACED:
            return None
        tensor, *options = args
        uniform = self._uniform(tensor.shape, tensor.device)
        if name == "native_dropout":
            kept = uniform >= options[0]
            return tensor * kept.to(tensor.dtype) / (1 - options[0]), kept
        if name == "bernoulli":
            return (uniform < (options[0] if options else tensor)).to(tensor.dtype)
        if name == "bernoulli_":
            return tensor.copy_(uniform < (options[0] if options else kwargs.get("p", 0.5)))
        if name == "exponential_":
            return tensor.copy_(-uniform.log() / (options[0] if options else kwargs.get("lambd", 1.0)))
        a, b = (options + [0.0, 1.0][len(options) :])[:2]
        if name == "uniform_":
            return tensor.copy_(a + (b - a) * uniform)
        return tensor.copy_(a + b * torch.special.ndtri(uniform))  # normal_: mean a, standard deviation b

    def _uniform(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Numbers in (0, 1), fp64, of `shape`: by sample along the dimension that indexes samples."""
        position, samples = self._position_and_samples()
        count = len(samples)
        digest = hashlib.blake2b(f"{self.seed}/{position}".encode(), digest_size=7).digest()
        salt = int.from_bytes(digest, "big")
        self.shapes[position] = shape
        dim = self.sample_dims.get(position, _likely_sample_dim(shape, count))
        if dim is None or not count or dim >= len(shape) or shape[dim] % count:  # one draw for all samples
            return self.keyed([0], torch.Size([1, *shape]), salt, device)[0]
        # Heads or positions may be folded into the dimension, with the samples outermost.
        rest = [shape[dim] // count, *shape[:dim], *shape[dim + 1 :]]
        drawn = self.keyed(samples, torch.Size([count, *rest]), salt, device)
        return drawn.flatten(0, 1).movedim(0, dim)

    def keyed(self, ids: list[int], shape: torch.Size, salt: int, device: torch.device) -> Tensor:
        """Uniform fp64 numbers of `shape`; row k is a function of `ids[k]` and `salt`: splitmix64.

        Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
        """
        row = torch.tensor(ids, dtype=torch.int64, device=device).unsqueeze(1)
        column = torch.arange(math.prod(shape[1:]), dtype=torch.int64, device=device).unsqueeze(0)
        return in_unit_interval(mixed(mixed(row + salt) + column)).reshape(shape)

    def _position_and_samples(self) -> tuple[str, list[int]]:
        """Those of the next draw; in a checkpointed module's second forward pass, those of its first.

        A checkpoint restores the state of torch's generator, which shows which draw is repeated.
        """
        with outside_transforms():
            state = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=16).digest()
            torch.rand(())  # the next draw begins from another state
        if in_backward() and state in self._drawn:
            return self._drawn[state]
        self._drawn[state] = self.modules.next_position(), self.modules.samples
        return self._drawn[state]


def _likely_sample_dim(shape: torch.Size, samples: int) -> int | None:
    """The first dimension of size `samples`, or dimension 0 if its size is a multiple."""
    if not samples:
        return None
    multiple = 0 if shape and shape[0] and shape[0] % samples == 0 else None
    return next((d for d, size in enumerate(shape) if size == samples), multiple)


def sample_dims(shapes: Mapping[str, torch.Size], fewer: Mapping[str, torch.Size]) -> dict[str, int | None]:
    """The first dimension, by position, in which draws differ from those of a pass over fewer samples."""
    dims = {}
    for position, shape in shapes.items():
        if position in fewer and len(fewer[position]) == len(shape):
            sizes = zip(shape, fewer[position], strict=True)
            dims[position] = next((d for d, (size, less) in enumerate(sizes) if size != less), None)
    return dims


@contextmanager
def fixed_draws(
    model: nn.Module,
    batch: WholeBatch,
    seed: int,
    numbers: Sequence[int] | None = None,
    sample_dims: Mapping[str, int | None] | None = None,
) -> Iterator[FixedDraws]:
    """Fixes the draws of forward passes of `model`, and of the loss after each, on samples of `batch`.

    These have `numbers`.

    `sample_dims` is as in `Problem`; at other positions the dimension is inferred from its size.
    """
    modules = ModuleTracker(model, SampleIds(batch[0], numbers, batch[1]))
    draws = FixedDraws(modules, seed, sample_dims or {})
    # Fused attention draws inside its kernel; the math backend calls an operator.
    with modules.hooks, sdpa_kernel([SDPBackend.MATH]), draws:
        yield draws


@contextmanager
def seeded_draws(
    problem: Problem, model: nn.Module, batch: WholeBatch, numbers: Sequence[int] | None = None
) -> Iterator[None]:
    """Seeds torch as for every window and larger batch of the proof, and fixes draws if the problem does."""
    with ExitStack() as stack:
        stack.enter_context(forked_rng(problem.device))
        # torch.manual_seed keeps a stack trace for a GPU that is not in use, which is slow.
        torch.default_generator.manual_seed(problem.seed)
        if problem.device.type == "cuda":
            torch.cuda.manual_seed_all(problem.seed)
        if problem.fixed_draws:
            stack.enter_context(fixed_draws(model, batch, problem.seed, numbers, problem.sample_dims))
        yield


def in_unit_interval(bits: Tensor) -> Tensor:
    """Numbers in (0, 1), fp64, of int64 `bits`."""
    return (_shift(bits, 11).double() + 0.5) * 2.0**-53


def mixed(x: Tensor) -> Tensor:
    """The bits of int64 `x`, mixed as splitmix64 does."""
    # The constants as int64.
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
