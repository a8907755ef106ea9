"""Gradients of losses that are made in the forward pass."""

import torch
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree

from ..codes.calls import Call
from ..codes.units import MIB
from .double_backward import first_order_only

# Size of a gradient from which on it is kept as codes.
MIN_CODED_BYTES = MIB

# Nodes of a graph that are searched for inputs that nobody has named.
_MAX_NODES = 10000

# Not float16: gradients before a scaler's factor would underflow.
_FLOATS = (torch.float32, torch.bfloat16)


class _Loss(Function):
    """A loss whose gradients are known.

    ``parts`` are the kept gradients, one for each input: None, or the format
    (None for the tensor itself) and the tensors.
    """

    @staticmethod
    def forward(ctx, loss, parts, *inputs):
        ctx.formats = [part and (part[0], len(part[1])) for part in parts]
        ctx.shapes = [x.shape for x in inputs]
        ctx.save_for_backward(*(t for part in parts if part for t in part[1]))
        return loss.detach()

    @staticmethod
    @first_order_only('a loss with a gradient from its forward pass')
    def backward(ctx, grad_loss):
        saved = iter(ctx.saved_tensors)
        grads = []
        for found, shape in zip(ctx.formats, ctx.shapes):
            grad = None
            if found is not None:
                format, count = found
                tensors = [next(saved) for _ in range(count)]
                if format is None:
                    grad = tensors[0] * grad_loss
                else:
                    grad = format.payload(*tensors).unpack()
                    grad = grad.mul_(grad_loss).view(shape)
            grads.append(grad)
        return None, None, *grads


def run_loss(function, args, kwargs, quantizer):
    """Call a function that computes losses, and make their gradients at once.

    What its operations keep is freed before the function returns. In their
    place the gradient of each loss with respect to the arguments is kept:
    exactly below 1 MiB, else as codes. Values are the function's own;
    gradients are linear in the codes, hence unbiased.

    The function runs as written if its results depend on anything that
    requires a gradient besides the tensors among its arguments, in lists,
    tuples and dicts, if one of these is float16, has hooks or was overwritten,
    and if less is kept so, as of losses of few places of large tensors. Of its
    results all tensors of one element are losses; others keep their graph.

    Args:
        function (Callable): The function.
        args (tuple): Its arguments.
        kwargs (dict): Its keyword arguments.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        object: Results of the function.
    """
    inputs = inputs_of(args, kwargs)
    if not all(map(_is_plain_input, inputs)):
        return function(*args, **kwargs)
    edges = [_edge_of(x) for x in inputs]
    versions = [x._version for x in inputs]
    saved = _Saved(quantizer.meter is not None)
    with saved_tensors_hooks(saved.pack, saved.unpack):
        results = function(*args, **kwargs)
    leaves, spec = _pytree.tree_flatten(results)
    places = [i for i, leaf in enumerate(leaves) if _is_loss(leaf)]
    losses = [leaves[i] for i in places]
    parts = None
    if (
        # Most that is worth nothing is found before anything is computed.
        saved.nbytes > sum(map(_kept_bytes, inputs))
        and versions == [x._version for x in inputs]
        and _depend_on([_edge_of(loss) for loss in losses], edges)
    ):
        parts = [_keep_gradients(loss, inputs, quantizer) for loss in losses]
    kept = _tensors_of(parts or ())
    is_less = sum(tensor.nbytes for tensor in kept) < saved.nbytes
    if parts is None or not is_less:
        if quantizer.meter is not None:
            quantizer.meter.observe(saved.tensors)
        return results
    if quantizer.meter is not None:
        quantizer.record(kept, Call(statistics=tuple(saved.tensors)))
    for i, loss, of_loss in zip(places, losses, parts):
        leaves[i] = _Loss.apply(loss.detach(), of_loss, *inputs)
    return _pytree.tree_unflatten(leaves, spec)


def inputs_of(args, kwargs):
    """Tensors among arguments that require a gradient.

    Args:
        args (tuple): Arguments of a function.
        kwargs (dict): Its keyword arguments.

    Returns:
        list[Tensor]: The tensors, each once.
    """
    return list(
        {
            id(leaf): leaf
            for leaf in _pytree.tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad
        }.values()
    )


def _tensors_of(parts):
    """All tensors of the kept gradients of some losses."""
    return tuple(
        tensor
        for of_loss in parts
        for part in of_loss
        if part is not None
        for tensor in part[1]
    )


class _Saved:
    """What autograd saves for the backward pass of a function.

    It takes the place of other hooks: most that is saved is freed at once, and
    need not be moved elsewhere.

    Args:
        keeps (bool): Whether to keep the tensors, too.

    Attributes:
        tensors (list[Tensor]): The tensors that were kept.
    """

    def __init__(self, keeps):
        self._keeps = keeps
        self._sizes = {}
        self.tensors = []

    @property
    def nbytes(self):
        """int: Bytes of all storages."""
        return sum(self._sizes.values())

    def pack(self, tensor):
        """Hook for a tensor that autograd saves."""
        storage = tensor.untyped_storage()
        self._sizes[storage._cdata] = storage.nbytes()
        if self._keeps:
            self.tensors.append(tensor)
        # Detached: an output that its own node saves would own that node.
        return tensor.detach(), tensor._version

    @staticmethod
    def unpack(packed):
        """Hook for a tensor that autograd reads; raises as autograd does."""
        tensor, version = packed
        if tensor._version != version:
            raise RuntimeError(
                'a tensor that a loss needs for its backward pass was '
                'modified in place after the loss had been computed: shape '
                f'{tuple(tensor.shape)}, version {tensor._version} where '
                f'{version} was expected'
            )
        return tensor


def _kept_bytes(tensor):
    """About the size of a kept gradient of a tensor."""
    if tensor.nbytes < MIN_CODED_BYTES:
        return tensor.nbytes
    # A code of a byte.
    return tensor.numel()


def _is_plain_input(tensor):
    return (
        tensor.dtype in _FLOATS
        and not tensor._backward_hooks
        and not tensor.retains_grad
    )


def _is_loss(result):
    return (
        isinstance(result, torch.Tensor)
        and result.requires_grad
        and result.numel() == 1
    )


def _edge_of(tensor):
    """Node that makes a tensor, and the number of its output."""
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _depend_on(outputs, inputs):
    """Whether all ways back from some edges of a graph lead to others.

    Args:
        outputs (list[tuple]): The former, at least one.
        inputs (list[tuple]): The latter.

    Returns:
        bool: False also if the graph between them is too large to tell.
    """
    ends, seen, todo = set(inputs), set(), list(outputs)
    while todo:
        edge = todo.pop()
        node = edge[0]
        if node is None or edge in ends or node in seen:
            continue
        if hasattr(node, 'variable') or len(seen) == _MAX_NODES:
            return False
        seen.add(node)
        todo += node.next_functions
    return bool(outputs)


def _keep_gradients(loss, inputs, quantizer):
    """Gradients of a loss, as ``_Loss`` keeps them."""
    # Backward passes run without autocast.
    with torch.autocast(loss.device.type, enabled=False):
        grads = torch.autograd.grad(
            loss,
            inputs,
            torch.ones_like(loss),
            retain_graph=True,
            allow_unused=True,
        )
    parts = []
    for grad in grads:
        if grad is None:
            parts.append(None)
        elif grad.nbytes < MIN_CODED_BYTES:
            if grad.untyped_storage().nbytes() > grad.nbytes:
                # Part of a larger one, which would live as long.
                grad = grad.clone()
            parts.append((None, (grad,)))
        else:
            rows = grad.unsqueeze(0) if grad.dim() < 2 else grad
            parts.append(quantizer.keep(rows, needed=True))
    return parts
