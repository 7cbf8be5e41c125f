"""Which module of a model computes, and on which samples of the batch, by hooks on its modules."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from .nested import is_transformed, tensors
from .sample_ids import SampleIds, row_count

# What computes where no module does: the loss, or the loop itself.
OUTSIDE = "(outside the model)"
LOSS = "(loss)"


def in_backward() -> bool:
    """Whether autograd computes, which runs the forward passes of checkpointed modules again."""
    return torch._C._current_graph_task_id() != -1


def outside_transforms() -> AbstractContextManager[Any]:
    """A context in which the transforms of torch.func, such as vmap, do not wrap what is computed."""
    return temporarily_clear_interpreter_stack()


class ModuleTracker:
    """Follows which module computes, by forward hooks, and which samples the model was called with.

    Attributes:
        samples: numbers of the samples in the newest forward pass of the model, or of a part of it that a
            loop calls by itself.
        hooks: removes the hooks on exit.
    """

    def __init__(self, model: nn.Module, ids: SampleIds) -> None:
        self.samples: list[int] = []
        self._stack: list[str] = []
        self._draws: dict[str, int] = {}  # by module, in this forward pass
        self._draws_on_entry: dict[str, dict[str, int]] = {}
        self._ids = ids
        self._first_equal = ids.first_equal()
        self._next_unknown = 0
        self._outputs: dict[int, tuple[weakref.ref[Tensor], list[int]]] = {}  # by their memory
        self._model = model
        self._names = {module: name or "(model)" for name, module in model.named_modules()}
        self.hooks = ExitStack()
        for module in self._names:
            # Before the user's own hooks, which may change the inputs.
            enter = module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
            self.hooks.enter_context(enter)
            self.hooks.enter_context(module.register_forward_hook(self._leave, always_call=True))

    def __deepcopy__(self, memo: Any) -> ModuleTracker:
        """Itself: a copy of the model, such as a loop's teacher, has the hooks too, which ignore it."""
        return self

    def _enter(self, module: nn.Module, arguments: Any, keywords: Any) -> None:
        if module not in self._names:
            return
        if not in_backward() and (module is self._model or not self._stack):
            with outside_transforms():
                self.start_pass([arguments, keywords], whole=module is self._model)
        self._stack.append(self._names[module])
        self._draws_on_entry[self.module] = dict(self._draws)

    def start_pass(self, inputs: Any, whole: bool = True) -> None:
        """Begins a forward pass on `inputs`: of the `whole` model, or of a part that is called by itself."""
        numbers = self._ids.find(inputs)
        size = row_count(inputs)
        if numbers is None and not whole and size == len(self.samples):
            return  # another part, on what the one before has made of these samples
        self._draws.clear()
        if numbers is None:
            numbers = list(range(self._next_unknown, self._next_unknown + size))
            self._next_unknown += size
        # Equal samples have the same draws, because ranks do not know which of them each has.
        self.samples = [self._first_equal.get(number, number) for number in numbers]

    def _leave(self, module: nn.Module, arguments: Any, outputs: Any) -> None:
        if self._stack and module in self._names:
            self._stack.pop()
            if not self._stack and not in_backward():
                for tensor in tensors(outputs):
                    if (memory := _memory(tensor)) is not None:
                        self._outputs[memory] = weakref.ref(tensor), self.samples

    def follow(self, arguments: Any) -> None:
        """Goes back to the samples of an earlier pass where an operator of the loss takes its outputs.

        A loop may compute the losses after all its forward passes, or one loss of all their outputs.
        """
        passes: list[list[int]] = []
        for tensor in tensors(arguments):
            reference, samples = self._outputs.get(_memory(tensor) or 0, (None, []))
            if (
                reference is not None
                and reference() is not None
                and all(samples is not each for each in passes)
            ):
                passes.append(samples)
        samples = [number for each in passes for number in each]
        if samples and samples != self.samples:
            self.samples = samples
            self._draws.pop(OUTSIDE, None)

    @property
    def module(self) -> str:
        """Name of the module that computes."""
        return self._stack[-1] if self._stack else OUTSIDE

    def next_position(self) -> str:
        """The position of the next draw in the forward pass: the module and the number of its draw."""
        number = self._draws[self.module] = self._draws.get(self.module, -1) + 1
        return f"{self.module}/{number}"

    @contextmanager
    def repeated(self, module: str, samples: int) -> Iterator[None]:
        """Repeats the draws of `module` in this forward pass, for the first `samples` samples."""
        original = self._draws, self.samples
        self._draws, self.samples = dict(self._draws_on_entry[module]), self.samples[:samples]
        try:
            yield
        finally:
            self._draws, self.samples = original


def _memory(tensor: Tensor) -> int | None:
    """The address of the tensor's elements; None for one without memory of its own."""
    if is_transformed(tensor) or tensor.layout is not torch.strided:
        return None
    return tensor.untyped_storage().data_ptr()
