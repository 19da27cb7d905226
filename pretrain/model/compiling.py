"""Compilation with torch.compile: functions that are marked with `@graph` become one graph each.

A graph per function, instead of one for the whole model, is compiled once for all blocks, however deep the model is.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.fx.experimental._config
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])

MOST_GRAPHS = 12  # of one method; a run has fewer


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
    module: nn.Module,
    *,
    partitioned: bool = False,
    several_shapes: bool = False,
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Compile the marked methods of a module and of all modules in it, in place.

    Only training uses the graphs. Evaluation, which is short, would need as many again.

    All instances of a class share torch's limit on recompilations, which is raised here: beyond it, torch silently
    stops compiling.

    Args:
        module: Module to compile.
        partitioned: Whether ZeRO 3 partitions the parameters. It gathers them in hooks around a module's forward pass,
            which torch.compile cannot follow, so that the only methods with parameters are those named `forward`, of
            modules that are gathered as a whole.
        several_shapes: Whether batches or images of several sizes are expected. Each graph then fits all sizes;
            otherwise it is made for the first size, which is faster.
        backend: Backend of torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    # Sizes that are equal by chance, such as those of the batch and of the images, may differ in the next batch.
    torch.fx.experimental._config.use_duck_shape = False
    for part in module.modules():
        for name in dir(type(part)):
            uses_parameters = getattr(getattr(type(part), name, None), "graph_uses_parameters", None)
            if uses_parameters is not None and not (partitioned and uses_parameters and name != "forward"):
                plain = getattr(part, name)
                compiled = torch.compile(plain, backend=backend, dynamic=several_shapes or None)
                setattr(part, name, _in_training(part, compiled, plain))


def _in_training(module: nn.Module, compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that is compiled while its module is in training mode."""

    @wraps(plain)
    def call(*args: Any, **options: Any) -> Any:
        return (compiled if module.training else plain)(*args, **options)

    return call
