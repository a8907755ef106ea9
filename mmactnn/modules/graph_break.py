"""Calls outside of graphs of torch.compile.

Importing this module imports the compiler, which takes about a second. Others
import it when they are compiled.
"""

import functools
import logging

import torch


@torch.compiler.disable
def call_outside_graph(function, *args):
    """Call a function eagerly within code that torch.compile compiles.

    The first such call is logged.

    Args:
        function (Callable): The function.
        *args: Its arguments.

    Returns:
        object: Its result.
    """
    _tell_outside_graph()
    return function(*args)


@functools.cache
def _tell_outside_graph():
    logging.getLogger('mmactnn').warning(
        'torch.compile: compressed layers run outside of the compiled graph'
    )
