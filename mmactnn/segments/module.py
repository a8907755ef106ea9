"""Modules that run as segments."""

import functools

import torch

from ..modules.class_swap import replace_class, wrap_forward, wrapped_class
from ..modules.execution import is_transformed
from .checkpoint import run_segment


class Segment:
    """Mixin of the classes of modules that run as segments.

    The class has the name and the signature of its parent. In training with
    gradients its forward pass is a checkpoint whose inputs are codes, else
    its parent's.

    Attributes:
        plain_class (type): The parent.
    """

    plain_class = None

    def __reduce_ex__(self, protocol):
        return _make_instance, (self.plain_class,), self.__getstate__()


@functools.cache
def _segment_class(cls):
    return wrap_forward(Segment, cls, _run)


def _make_instance(cls):
    cls = _segment_class(cls)
    return cls.__new__(cls)


def _run(cls, module, *args, **kwargs):
    quantizer = module.__dict__.get('_segment')
    if (
        quantizer is None
        or not module.training
        or not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or is_transformed()
    ):
        return cls.forward(module, *args, **kwargs)
    function = functools.partial(cls.forward, module)
    return run_segment(quantizer, function, args, kwargs)


def set_segment(module, quantizer):
    """Let a module run as a segment, in place.

    Args:
        module (nn.Module): The module, no segment yet.
        quantizer (LayerQuantizer): Settings of its inputs.
    """
    # Bypasses the checks of nn.Module.__setattr__.
    module.__dict__['_segment'] = quantizer
    plain = wrapped_class(type(module))
    replace_class(module, plain, _segment_class(plain))


def revert_segments(model):
    """Undo :func:`set_segment` for all parts of a model.

    Args:
        model (nn.Module): The model.

    Returns:
        list[nn.Module]: The modules that were segments.
    """
    reverted = [m for m in model.modules() if is_segment(m)]
    for module in reverted:
        del module.__dict__['_segment']
        cls = wrapped_class(type(module))
        replace_class(module, cls, cls.plain_class)
    return reverted


def is_segment(module):
    """Whether a module runs as a segment.

    Args:
        module (nn.Module): The module.
    """
    return isinstance(module, Segment)
