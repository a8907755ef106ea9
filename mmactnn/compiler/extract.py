"""Forward and backward module of a joint graph, by torch's own functions.

These are private, and differ between versions: this is the only module that
calls them.
"""

import importlib
import inspect

import torch

from .joint import is_tangent, must_save
from .values import is_symbol

_PARTITIONERS = 'torch._functorch.partitioners'
_NEEDED = (
    '_extract_fwd_bwd_modules',
    'cleanup_recompute_tags',
    'functionalize_rng_ops',
    'has_recomputable_ops',
    'has_recomputable_rng_ops',
    'min_cut_rematerialization_partition',
    'raise_getitems',
    'reordering_to_mimic_autograd_engine',
)
# Marks that not all versions need.
_MARKS = (
    'force_save_collectives',
    'force_save_effectful_ops',
    'force_save_bw_mutation_src',
)


def partitioners():
    """Torch's module of partitioners, checked to hold what is called.

    Returns:
        module: The module.

    Raises:
        RuntimeError: If this version of torch lacks a function.
    """
    try:
        module = importlib.import_module(_PARTITIONERS)
    except ImportError:
        module = None
    missing = [name for name in _NEEDED if not hasattr(module, name)]
    if module is not None and not missing:
        signature = inspect.signature(module._extract_fwd_bwd_modules)
        needed = ('saved_values', 'saved_sym_nodes', 'num_fwd_outputs')
        missing = [n for n in needed if n not in signature.parameters]
    if module is None or missing:
        raise RuntimeError(
            f'mmactnn.compile needs {_PARTITIONERS} with '
            f'{", ".join(missing or ["its functions"])}, which torch '
            f'{torch.__version__} lacks: use torch 2.10 to 2.13, or '
            'mmactnn.convert_model, which needs no compiler'
        )
    return module


def inductor_base():
    """Class of partitioners that Inductor takes.

    Returns:
        type: The class.

    Raises:
        RuntimeError: If this version of torch has none.
    """
    from torch._inductor import config, custom_graph_pass

    base = getattr(custom_graph_pass, 'CustomPartitionerFn', None)
    if base is None or not hasattr(config, 'custom_partitioner_fn'):
        raise RuntimeError(
            'mmactnn.compile needs the option custom_partitioner_fn of '
            f'Inductor, which torch {torch.__version__} lacks: use torch '
            '2.10 or newer, or mmactnn.convert_model'
        )
    return base


def tidy(module):
    """Prepare a joint graph as torch's partitioner does.

    Args:
        module (fx.GraphModule): The joint graph; changed.

    Returns:
        fx.GraphModule: The same.
    """
    torch_side = partitioners()
    module.graph.eliminate_dead_code()
    if torch._functorch.config.cse:
        module.graph = torch_side.fx_graph_cse(module.graph)
    if torch_side.has_recomputable_ops(module):
        cleanup = torch_side.cleanup_recompute_tags
        module = _call(cleanup, module, is_default_partition=False)
    for name in _MARKS:
        if hasattr(torch_side, name):
            getattr(torch_side, name)(module)
    return module


def extract(module, kept, num_outputs, static_inputs):
    """Split a joint graph whose gradients read what is kept.

    Args:
        module (fx.GraphModule): The joint graph.
        kept (set[fx.Node]): Values that the backward pass does not compute.
        num_outputs (int): Number of outputs of the forward pass.
        static_inputs (Sequence[int]): Positions of parameters and buffers.

    Returns:
        tuple[fx.GraphModule, fx.GraphModule, list[fx.Node]]: Forward and
        backward module, and the tensors that pass between them.
    """
    torch_side = partitioners()
    tensors, symbols = _frontier(module, kept, num_outputs)
    primals = [
        n
        for n in module.graph.nodes
        if n.op == 'placeholder' and not is_tangent(n)
    ]
    static = {p for i, p in enumerate(primals) if i in set(static_inputs)}
    forward, backward = _call(
        torch_side._extract_fwd_bwd_modules,
        module,
        tensors,
        saved_sym_nodes=symbols,
        num_fwd_outputs=num_outputs,
        static_lifetime_input_nodes=static,
    )
    if torch_side.has_recomputable_rng_ops(module):
        forward, backward = torch_side.functionalize_rng_ops(
            module, forward, backward, len(symbols)
        )
    backward = torch_side.reordering_to_mimic_autograd_engine(backward)
    forward = torch_side.raise_getitems(forward)
    backward = torch_side.raise_getitems(backward)
    thread = getattr(torch_side, 'thread_graphsafe_rng_from_hops', None)
    if thread is not None:
        forward = thread(forward, is_backward=False)
        backward = thread(backward, is_backward=True)
    return forward, backward, tensors


def _frontier(module, kept, num_outputs):
    """Where the backward pass meets the forward pass.

    Returns:
        tuple[list[fx.Node], list[fx.Node]]: Tensors and numbers.
    """
    outputs = next(iter(reversed(module.graph.nodes))).args[0]
    todo = [n for n in outputs[num_outputs:] if isinstance(n, torch.fx.Node)]
    tensors, symbols, seen = set(), set(), set()
    while todo:
        node = todo.pop()
        if node in seen or is_tangent(node):
            continue
        seen.add(node)
        if is_symbol(node):
            symbols.add(node)
        elif node.op == 'placeholder' or node in kept or must_save(node):
            tensors.add(node)
        else:
            todo += node.all_input_nodes
    # A symbol that depends on a gradient's shape is one of the backward pass.
    gradients = _dependent_on_gradients(module)
    order = [n for n in module.graph.nodes if n not in gradients]
    return (
        [n for n in order if n in tensors],
        [n for n in order if n in symbols],
    )


def _dependent_on_gradients(module):
    found = set()
    for node in module.graph.nodes:
        if is_tangent(node) or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _call(function, *args, **kwargs):
    """Call a function with those of the arguments by name that it has."""
    parameters = inspect.signature(function).parameters
    known = {k: v for k, v in kwargs.items() if k in parameters}
    return function(*args, **known)
