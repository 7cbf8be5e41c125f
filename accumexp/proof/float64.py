"""fp64 all the way: what a loop, a loss or a model narrows to fp32 by itself stays fp64.

`criterion(model(x).float(), y)` and sums kept in fp32 are right in a loop's own precision. In fp64 they
would round to 2^-24 what is compared to 2^-53, and a right window would look wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NARROW = (torch.float32, torch.bfloat16, torch.float16)
MAKING = {
    f"{prefix}{kind}{suffix}"
    for kind in ("empty", "zeros", "ones", "full")
    for prefix, suffix in (("", ""), ("", "_like"), ("new_", ""))
}


class Float64(TorchDispatchMode):
    """Active, an fp64 tensor is not narrowed, and a new one that would be narrower is fp64.

    Numbers of shape () that no gradient goes through are left alone: loss scales, losses to be logged.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") not in NARROW:
            return func(*args, **kwargs)
        name = func.__name__.partition(".")[0]
        wide = {**kwargs, "dtype": torch.float64}
        if name == "_to_copy":
            given: Tensor = args[0]
            if given.dtype is torch.float64 and (given.dim() or given.requires_grad):
                return func(*args, **wide)
        elif name in MAKING:
            made = func(*args, **kwargs)
            return func(*args, **wide) if made.dim() else made
        return func(*args, **kwargs)


@contextmanager
def computing(dtype: torch.dtype) -> Iterator[None]:
    """Inside, with fp64, nothing narrower is made of it; any other dtype changes nothing."""
    if dtype is not torch.float64:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            yield
    finally:
        torch.set_default_dtype(before)
