"""Choice of the parts that run as CUDA graphs."""

from torch import nn

from ..config import check_count, checked
from ..convert.api import find_precisions
from ..modules.naming import named_modules, sharded_modules
from ..offload import attached_swap
from .part import CALL, GraphedPart

# Method that computes the features in models of OpenMMLab: backbone and neck.
_FEATURES = 'extract_feat'


def use_cuda_graphs(model, parts=None, max_graphs=4, warmup=3):
    """Run parts of a model as CUDA graphs in training, in place.

    Kernels of a part then follow each other without the host: forward and
    backward pass take a call each. It pays where the GPU waits for the host,
    as in models of many small layers and with small batches, and if the
    shapes of a part's inputs repeat. Each kind of call, by shapes, has graphs
    of its own; calls without a graph run as usual.

    The graphs of a part hold a pool of memory that the rest of the step
    cannot use: the part's peak. A part's results lie there until its next
    call. Gradients of its parameters arrive all at once, at the end of its
    backward pass, so that DistributedDataParallel sends them later.

    Args:
        model (nn.Module): The model, converted or not, with or without a
            wrapper.
        parts (Sequence[str], optional): Names of modules (``'backbone'``)
            and methods (``'extract_feat'``) whose calls become graphs; ``''``
            is the model itself. Arguments and results must be tensors,
            containers of them, and constants. Defaults to
            ``['extract_feat']``: backbone and neck in models of OpenMMLab.
        max_graphs (int, optional): Kinds of calls of each part that get
            graphs, the first ones that repeat. Defaults to 4.
        warmup (int, optional): Calls of a kind that run as usual before it
            is captured. Defaults to 3.

    Returns:
        dict[str, GraphedPart]: The parts by name, with their ``stats``.

    Raises:
        TypeError: If ``model`` is no module or ``parts`` no list of strings.
        ValueError: If the model has no part of a name, or a part lies within
            another one or is compiled.
        RuntimeError: If the model swaps tensors to the host, follows the
            gradients of samples, or is sharded by FSDP.

    Examples:
        >>> mmactnn.convert_model(model, 'L3')
        >>> mmactnn.use_cuda_graphs(model, ['backbone', 'neck'])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f'model must be an nn.Module, got {type(model).__name__}'
        )
    if parts is None:
        parts = (_FEATURES,)
    if isinstance(parts, str) or not all(isinstance(p, str) for p in parts):
        raise TypeError(f'parts must be a list of names, got {parts!r}')
    max_graphs = checked('max_graphs', max_graphs, check_count)
    warmup = checked('warmup', warmup, check_count)
    if attached_swap(model) is not None:
        raise RuntimeError(
            'tensors that are swapped to the host cannot be part of a CUDA '
            'graph: choose a level without swap'
        )
    if sharded_modules(model):
        raise RuntimeError(
            'parameters that FSDP gathers have another place in every step, '
            'and cannot be part of a CUDA graph'
        )
    precisions = find_precisions(model)
    if any(precision.num_samples is not None for precision in precisions):
        raise RuntimeError(
            'a CUDA graph cannot follow the gradients of samples: choose a '
            'level without use_gradient'
        )
    modules = dict(named_modules(model))
    found = {name: _resolve(modules, name) for name in parts}
    _refuse_nested(found)
    remove_cuda_graphs(model)
    for name, (module, method) in found.items():
        if method == CALL and module._compiled_call_impl is not None:
            raise ValueError(f'{name!r} is compiled, and cannot be captured')
    graphed = {}
    for name, (module, method) in found.items():
        own = find_precisions(module)
        part = GraphedPart(
            module,
            method,
            name or type(module).__name__,
            max_graphs,
            warmup,
            own.pop() if own else None,
        )
        # Bypasses the checks of nn.Module.__setattr__.
        module.__dict__[method] = part
        graphed[name] = part
    return graphed


def remove_cuda_graphs(model):
    """Run all parts of a model as usual again, in place.

    Args:
        model (nn.Module): The model.
    """
    for module in model.modules():
        for method, value in list(vars(module).items()):
            if isinstance(value, GraphedPart):
                del module.__dict__[method]


def _resolve(modules, name):
    """Module and method of a part."""
    if name in modules:
        return modules[name], CALL
    owner, _, method = name.rpartition('.')
    module = modules.get(owner)
    if module is None or not callable(getattr(type(module), method, None)):
        children = [key for key in modules if key and '.' not in key]
        raise ValueError(
            f'the model has no module and no method {name!r} to run as a CUDA '
            f'graph; its modules are {", ".join(children)}'
        )
    return module, method


def _refuse_nested(found):
    owners = {name: module for name, (module, _) in found.items()}
    for name, module in owners.items():
        parts = set(module.modules())
        for other, inner in owners.items():
            if other != name and inner in parts:
                raise ValueError(
                    f'{other!r} lies within {name!r}: name one of them'
                )
