"""Classes of blocks that run as segments in training."""

import contextlib
import functools

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ..modules.class_swap import WithForward, replace_class, wrapped_class
from ..modules.eager import meets_compiler
from ..modules.execution import refuse_script
from .checkpoint import run_segment


class SegmentBlock(WithForward):
    """Mixin of the classes of blocks that run as segments.

    Their forward pass runs as a segment in training, and is the parent's
    elsewhere.
    """

    __prepare_scriptable__ = refuse_script

    @staticmethod
    def run_forward(cls, module, *args, **kwargs):
        """See the base class."""
        # A bound method may outlive a conversion.
        quantizer = module.__dict__.get('_segment')
        if (
            quantizer is None
            or not module.training
            or not torch.is_grad_enabled()
        ):
            return cls.forward(module, *args, **kwargs)
        if meets_compiler():
            from ..modules.graph_break import call_outside_graph

            return call_outside_graph(
                _run, cls, module, args, kwargs, quantizer
            )
        return _run(cls, module, args, kwargs, quantizer)


def _run(cls, module, args, kwargs, quantizer):
    if not _needs_gradients(module, tree_leaves((args, kwargs))):
        return cls.forward(module, *args, **kwargs)
    function = functools.partial(cls.forward, module)
    modules = list(module.modules())

    def run(function, args, kwargs):
        return run_segment(function, args, kwargs, quantizer, None, modules)

    parts = module.__dict__.get('_parts')
    if parts is None:
        return run(function, args, kwargs)
    return parts.run(module, cls, function, args, kwargs, run)


def _needs_gradients(module, leaves):
    """Whether a call has gradients to compute, and values to encode."""
    if any(isinstance(leaf, fx.Proxy) for leaf in leaves):
        return False
    return any(
        isinstance(leaf, torch.Tensor) and leaf.requires_grad
        for leaf in leaves
    ) or any(p.requires_grad for p in module.parameters())


def is_segment(module):
    """Whether a module is a block that runs as a segment.

    Args:
        module (nn.Module): The module.
    """
    return isinstance(module, SegmentBlock)


def make_segment(module, quantizer, parts=None):
    """Make a module run as a segment, in place.

    Args:
        module (nn.Module): The module.
        quantizer (LayerQuantizer): Codec of its inputs.
        parts (BlockParts, optional): Division into several segments where it
            is large. Defaults to none.
    """
    cls = wrapped_class(type(module))
    replace_class(module, cls, SegmentBlock.of(cls))
    # Bypasses the checks of nn.Module.__setattr__.
    module.__dict__.update(_segment=quantizer, _parts=parts)


def undo_segments(model):
    """Give all segments of a model their plain classes again, in place.

    Args:
        model (nn.Module): The model.

    Returns:
        dict[nn.Module, tuple]: The blocks, each with the other arguments of
        :func:`make_segment`.
    """
    undone = {}
    for module in model.modules():
        if is_segment(module):
            own = module.__dict__
            undone[module] = own.pop('_segment', None), own.pop('_parts', None)
            plain = module.plain_class
            replace_class(module, SegmentBlock.of(plain), plain)
    return undone


@contextlib.contextmanager
def segments_replaced(model):
    """Undo the segments of a model, as a context that makes new ones.

    Args:
        model (nn.Module): The model. It gets its segments back if the context
            raises.
    """
    undone = undo_segments(model)
    try:
        yield
    except BaseException:
        for module, settings in undone.items():
            make_segment(module, *settings)
        raise
