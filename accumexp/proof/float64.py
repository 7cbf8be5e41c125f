"""Computation in fp64 throughout: casts to fp32 within a loop, a loss or a model are undone.

`criterion(model(x).float(), y)` and sums kept in fp32 are correct in a loop's own precision. In an fp64
comparison they would round to 2^-24 what is compared to 2^-53, and a correct window would fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DOUBLE = torch.float64
NARROW = (torch.float32, torch.bfloat16, torch.float16)
FACTORIES = {
    f"{prefix}{kind}{suffix}"
    for kind in ("empty", "zeros", "ones", "full")
    for prefix, suffix in (("", ""), ("", "_like"), ("new_", ""))
}


class Float64(TorchDispatchMode):
    """While active, casts to dtypes narrower than fp64, and new tensors of such dtypes, give fp64.

    Casts of integers and masks do too: `images.float() / 255` is computed with weights in fp64.

    Tensors of shape () without a gradient are exempt: loss scales, and losses for the log.

    Attributes:
        acted: whether it has changed a dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        self.acted = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") not in NARROW:
            return func(*args, **kwargs)
        name = func.__name__.partition(".")[0]
        wide = {**kwargs, "dtype": DOUBLE}
        if name == "_to_copy":
            source: Tensor = args[0]
            wider = source.dtype is DOUBLE or not (source.is_floating_point() or source.is_complex())
            if wider and (source.dim() or source.requires_grad):
                self.acted = True
                return func(*args, **wide)
        elif name in FACTORIES:
            made = func(*args, **kwargs)
            self.acted |= bool(made.dim())
            return func(*args, **wide) if made.dim() else made
        return func(*args, **kwargs)


@dataclass
class Narrowing:
    """Whether a loop, model or loss narrows fp64: a mode that sees every operator is slow, and often useless.

    Attributes:
        possible: whether `Float64` has to be active.
        seen: whether it has changed a dtype.
    """

    possible: bool = True
    seen: bool = False


@contextmanager
def keep_float64(dtype: torch.dtype, narrowing: Narrowing | None = None) -> Iterator[None]:
    """Activates `Float64`, with fp64 as the default dtype, if `dtype` is fp64; else changes nothing.

    Args:
        narrowing: without `possible` only the default dtype is set; takes over whether a dtype was changed.
    """
    if dtype is not DOUBLE:
        yield
        return
    default = torch.get_default_dtype()
    torch.set_default_dtype(DOUBLE)
    try:
        if narrowing is not None and not narrowing.possible:
            yield
            return
        with Float64() as mode:
            yield
        if narrowing is not None:
            narrowing.seen |= mode.acted
    finally:
        torch.set_default_dtype(default)
