"""Compilation with torch.compile: functions that are marked with `@graph` become one graph each.

A graph per function, instead of one for the whole model, is compiled once for all blocks, however deep the model is.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])

# Blocks have no drop path, a low rate or a high one; each is compiled for training and evaluation, for a first shape
# and for any shape.
MOST_GRAPHS = 32


def graph(*, uses_parameters: bool = True) -> Callable[[Function], Function]:
    """Mark a method of a module as one that `compile_graphs` compiles to a graph.

    Args:
        uses_parameters: Whether the method reads parameters, also those of modules that it calls.
    """

    def mark(function: Function) -> Function:
        function.graph_uses_parameters = uses_parameters  # type: ignore[attr-defined]
        return function

    return mark


def compile_graphs(
    module: nn.Module, *, partitioned: bool = False, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile the marked methods of a module and of all modules in it, in place.

    All instances of a class share torch's limit on recompilations, which is raised here: beyond it, torch silently
    stops compiling.

    Args:
        module: Module to compile.
        partitioned: Whether ZeRO 3 partitions the parameters. It gathers them in hooks around a module's forward pass,
            which torch.compile cannot follow, so that the only methods with parameters are those named `forward`, of
            modules that are gathered as a whole.
        backend: Backend of torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    for part in module.modules():
        for name in dir(type(part)):
            uses_parameters = getattr(getattr(type(part), name, None), "graph_uses_parameters", None)
            if uses_parameters is not None and not (partitioned and uses_parameters and name != "forward"):
                setattr(part, name, torch.compile(getattr(part, name), backend=backend))
