"""The order in which the sums of norms over a window can be found, and models for which they cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .sync import Sync
from .window_norm import window_norms

# A call of a norm in a forward pass: the module's number, and how often it was called before.
Call = tuple[int, int]


class Marked(NamedTuple):
    """A micro-batch's value and share, and the marks (`window_norm.normalised`) of calls in its graph."""

    value: Tensor
    share: Tensor
    marks: dict[Call, Tensor]


def levels_of(marked: Marked) -> list[list[Call]]:
    """The calls whose marks the value depends on, from the last ones to the first.

    A call is one level below the lowest of those that use its output, directly or through other operators.
    """
    calls = {id(mark): call for call, mark in marked.marks.items()}
    users: dict[Any, int] = {}  # by node of the graph: the edges to it
    call_of: dict[Any, Call] = {}  # by the norm's node
    nodes: list[Any] = [marked.value.grad_fn] if marked.value.grad_fn is not None else []
    for node in nodes:
        for below, _ in node.next_functions:
            call = calls.get(id(getattr(below, "variable", None)))
            if call is not None:
                call_of[node] = call
            elif below is not None:
                if below not in users:
                    nodes.append(below)
                users[below] = users.get(below, 0) + 1
    levels: list[list[Call]] = []
    depth = dict.fromkeys(nodes, 0)
    ready = nodes[:1]
    for node in ready:
        below_it = depth[node]
        if node in call_of:
            levels += [[] for _ in range(below_it + 1 - len(levels))]
            levels[below_it].append(call_of[node])
            below_it += 1
        for below, _ in node.next_functions:
            if below in users:
                depth[below] = max(depth[below], below_it)
                users[below] -= 1
                if not users[below]:
                    ready.append(below)
    return [sorted(level) for level in levels]


def groups_of(
    levels: list[list[Call]], kept_before: Mapping[Call, int], most: int, steps: int
) -> list[list[list[Call]]]:
    """Groups of consecutive levels whose sums are found on the same graphs, one of each micro-batch.

    The graphs of a group of several levels keep together no more bytes for backward than one whole graph.

    Args:
        kept_before: bytes that a whole graph keeps when a call begins.
        most: bytes that it keeps at its end.
    """
    groups: list[list[list[Call]]] = []
    lowest = most
    for level in levels:
        lowest = min(lowest, *(kept_before[call] for call in level))
        if groups and steps * (most - lowest) <= most:
            groups[-1].append(level)
        else:
            groups.append([level])
    return groups


def check_norms(sync: Sync) -> None:
    """Refuses a model whose norms over the window cannot be made exact.

    Raises:
        ValueError: with the reason.
    """
    if not window_norms(sync.module):
        return
    if sync.sharded:
        raise ValueError(
            "norms over the window end forward passes early, and a fully sharded model gathers its "
            "parameters in whole ones"
        )
    parts = (sync.module, *sync.module.modules())
    if any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in parts):
        raise ValueError("norms over the window end forward passes early, and a compiled one cannot")
