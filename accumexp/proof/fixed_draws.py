"""Random draws of a model: which module makes them, and how a window does when every sample keeps its own.

torch marks every operator that draws with a tag; a dispatch mode sees them all, whatever module or
function asked. `FixedDraws` replaces what they draw by a function of the sample, the draw's place in the
forward pass and a seed, so that a sample's dropout mask is the same in every micro-batch it may be in.
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

from ..accum.batch import tensors
from .problem import Batch, Ids, Problem, seeded

Drawn = dict[str, set[str]]


class Modules:
    """The module that is computing, as forward hooks see it, and the rows of the outermost."""

    def __init__(self, model: nn.Module, ids: Ids) -> None:
        self.stack: list[str] = []
        self.rows: list[int] = []
        self.turns: dict[str, int] = {}
        self._entered: dict[str, dict[str, int]] = {}
        self._ids = ids
        self._alike = ids.alike()
        self._taken: dict[bytes, int] = {}
        self._next = 0
        self.names = {module: name or "(model)" for name, module in model.named_modules()}
        self.handles = [h for module in self.names for h in self._watch(module)]
        self._top = model

    def _watch(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, arguments: Any, keywords: Any) -> None:
        if module is self._top:
            self.turns.clear()
            given = [item for item in [*arguments, *keywords.values()] if item is not None]
            rows = self._ids.find(given, self._taken)
            if rows is None:
                size = _rows(given)
                rows = list(range(self._next, self._next + size))
                self._next += size
            # Equal samples draw alike: which of them a rank has, nobody can tell.
            self.rows = [self._alike.get(number, number) for number in rows]
        self.stack.append(self.names[module])
        self._entered[self.name] = dict(self.turns)

    def _leave(self, *_: Any) -> None:
        if self.stack:
            self.stack.pop()

    @property
    def name(self) -> str:
        return self.stack[-1] if self.stack else "(outside the model)"

    def place(self) -> str:
        """Where in the forward pass the draw is: the module, and which of its draws."""
        turn = self.turns[self.name] = self.turns.get(self.name, -1) + 1
        return f"{self.name}/{turn}"

    @contextmanager
    def again(self, name: str, rows: int) -> Iterator[None]:
        """Inside, module `name` draws once more what it drew in this forward pass, for the first `rows`."""
        kept = self.turns, self.rows
        self.turns, self.rows = dict(self._entered[name]), self.rows[:rows]
        try:
            yield
        finally:
            self.turns, self.rows = kept

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class FixedDraws(TorchDispatchMode):
    """Active, a draw is a function of sample, place and seed.

    Attributes:
        drawn: the operators that drew, by module.
        shapes: of what was drawn, by place.
        dims: see `Problem`.
        unknown: the operators among them that could not be replaced.
    """

    def __init__(self, modules: Modules, seed: int, dims: Mapping[str, int | None]) -> None:
        super().__init__()
        self.modules = modules
        self.seed = seed
        self.dims = dims
        self.shapes: dict[str, torch.Size] = {}
        self.drawn: Drawn = {}
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func.__name__.partition(".")[0]
        if name in ("native_dropout", "dropout") and (args[1] == 0 or args[2] is False):
            return func(*args, **kwargs)
        self.drawn.setdefault(self.modules.name, set()).add(name)
        replaced = self._replaced(name, func, args, kwargs)
        if replaced is None:
            self.unknown.add(name)
            return func(*args, **kwargs)
        return replaced

    def _replaced(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name == "native_dropout" and first is not None:
            kept = self._uniform(first.shape, first.device) >= args[1]
            return first * kept.to(first.dtype) / (1 - args[1]), kept
        if name == "bernoulli_" and first is not None:
            chance = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            return first.copy_(self._uniform(first.shape, first.device) < chance)
        if name == "bernoulli" and first is not None:
            chance = args[1] if len(args) > 1 else first
            return (self._uniform(first.shape, first.device) < chance).to(first.dtype)
        if name == "uniform_" and first is not None:
            low, high = (list(args[1:]) + [0.0, 1.0][len(args) - 1 :])[:2]
            return first.copy_(low + (high - low) * self._uniform(first.shape, first.device))
        if name == "normal_" and first is not None:
            mean, deviation = (list(args[1:]) + [0.0, 1.0][len(args) - 1 :])[:2]
            return first.copy_(mean + deviation * _normal(self._uniform(first.shape, first.device)))
        if name == "exponential_" and first is not None:
            rate = args[1] if len(args) > 1 else kwargs.get("lambd", 1.0)
            return first.copy_(-self._uniform(first.shape, first.device).log() / rate)
        if name in ("rand", "randn", "rand_like", "randn_like"):
            like = func(*args, **kwargs)
            uniform = self._uniform(like.shape, like.device)
            return (uniform if name in ("rand", "rand_like") else _normal(uniform)).to(like.dtype)
        return None

    def _uniform(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Numbers in (0, 1), fp64, of `shape`: by sample along the dimension that has the samples."""
        ids, rows = self.modules.rows, len(self.modules.rows)
        place = self.modules.place()
        salt = _salt(self.seed, place)
        self.shapes[place] = shape
        dim = self.dims[place] if place in self.dims else _likely(shape, rows)
        if dim is None or not rows or dim >= len(shape) or shape[dim] % rows:  # one draw for all samples
            return _keyed([0], torch.Size([1, *shape]), salt, device)[0]
        # Heads or positions may be folded into the dimension, the samples outermost.
        rest = [shape[dim] // rows, *shape[:dim], *shape[dim + 1 :]]
        drawn = _keyed(ids, torch.Size([rows, *rest]), salt, device)
        return drawn.flatten(0, 1).movedim(0, dim)


def _likely(shape: torch.Size, rows: int) -> int | None:
    """The dimension that probably has the samples: one of their number, or the first if it is a multiple."""
    if not rows:
        return None
    dim = next((d for d, size in enumerate(shape) if size == rows), None)
    if dim is None and shape and shape[0] and shape[0] % rows == 0:
        return 0
    return dim


def dimensions(one: Mapping[str, torch.Size], other: Mapping[str, torch.Size]) -> dict[str, int | None]:
    """By place, the dimension in which draws of two forward passes over other numbers of samples differ."""
    return {
        place: next(
            (d for d, pair in enumerate(zip(shape, other[place], strict=True)) if pair[0] != pair[1]), None
        )
        for place, shape in one.items()
        if place in other and len(other[place]) == len(shape)
    }


@contextmanager
def fixed_draws(
    model: nn.Module,
    batch: Batch,
    seed: int,
    numbers: Sequence[int] | None = None,
    dims: Mapping[str, int | None] | None = None,
) -> Iterator[FixedDraws]:
    """Inside, forward passes of `model` on samples of `batch` draw by sample, as `numbers` names them.

    `dims` as in `Problem`; where they are not known, the dimension of the samples is told by its size.
    """
    modules = Modules(model, Ids.of(batch[0], numbers))
    with ExitStack() as stack:
        stack.callback(modules.remove)
        # Fused attention draws inside its kernel; the plain one asks for a mask.
        stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        yield stack.enter_context(FixedDraws(modules, seed, dims or {}))


@contextmanager
def drawing(
    problem: Problem, model: nn.Module, batch: Batch, numbers: Sequence[int] | None = None
) -> Iterator[None]:
    """Inside, `model` draws as it does in every window and larger batch of the proof."""
    with ExitStack() as stack:
        stack.enter_context(seeded(problem.seed, problem.device))
        if problem.fixed:
            stack.enter_context(fixed_draws(model, batch, problem.seed, numbers, problem.dims))
        yield


def _rows(given: list[Any]) -> int:
    found = tensors(given)
    return found[0].shape[0] if found and found[0].dim() else 0


def _salt(seed: int, place: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=7).digest(), "big")


def _keyed(ids: list[int], shape: torch.Size, salt: int, device: torch.device) -> Tensor:
    """Uniform fp64 of `shape`, row k a function of `ids[k]` and `salt`: splitmix64 of a counter.

    Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
    """
    count = math.prod(shape[1:])
    row = torch.tensor(ids, dtype=torch.int64, device=device).unsqueeze(1)
    column = torch.arange(count, dtype=torch.int64, device=device).unsqueeze(0)
    mixed = _mix(_mix(row + salt) + column)
    return ((_shift(mixed, 11).double() + 0.5) * 2.0**-53).reshape(shape)


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _normal(uniform: Tensor) -> Tensor:
    return torch.special.ndtri(uniform)
