"""Classes of fused blocks, whose forward pass runs a plan in training."""

import functools

import torch

from ..functional import call_in_scope, unscoped_class
from ..modules.class_swap import replace_class, wrap_forward
from ..modules.execution import refuse_script
from ..modules.function_mode import call_outside


class FusedBlock:
    """Mixin of the classes of fused blocks.

    The class has the name and the signature of its parent, so that checks
    by name go on to work. Its forward pass runs the plan where the result is
    the same and no hook misses a call, and the parent's otherwise.

    Attributes:
        plain_class (type): Class of the block before it was fused.
    """

    plain_class = None
    __prepare_scriptable__ = refuse_script

    def __reduce_ex__(self, protocol):
        return _make_instance, (self.plain_class,), self.__getstate__()


@functools.cache
def fused_class(cls):
    """The class of fused blocks for a plain class.

    Args:
        cls (type): Class of the block before it was fused.

    Returns:
        type: A subclass of it, the same at every call.
    """
    return wrap_forward(FusedBlock, cls, _forward)


def _forward(cls, module, *args, **kwargs):
    # A bound method may outlive a conversion: MMEngine's activation
    # checkpointing keeps one.
    if getattr(module, '_fused', None) is None:
        return cls.forward(module, *args, **kwargs)
    if torch.compiler.is_compiling():
        if not module.training:
            return cls.forward(module, *args, **kwargs)
        from ..modules.graph_break import call_outside_graph

        return call_outside_graph(_run, module, cls, args, kwargs)
    return _run(module, cls, args, kwargs)


def _run(module, cls, args, kwargs):
    found = call_outside(module._fused.find_plan, module, cls, args, kwargs)
    if found is None:
        return call_in_scope(module, cls.forward, (module, *args), kwargs)
    plan, inputs = found
    del args
    return call_outside(module._fused.run, module, plan, inputs)


def _make_instance(cls):
    cls = fused_class(cls)
    return cls.__new__(cls)


def is_fused(module):
    """Whether a module is a fused block.

    Args:
        module (nn.Module): The module.
    """
    return isinstance(module, FusedBlock)


def plain_class_of(module):
    """The class of a module without fusion and scopes.

    Args:
        module (nn.Module): The module.

    Returns:
        type: Its class; that before the conversion if it is fused, or calls
        functions in a scope.
    """
    if isinstance(module, FusedBlock):
        return module.plain_class
    return unscoped_class(module)


def fuse(module, runner):
    """Make a module a fused block, in place.

    Args:
        module (nn.Module): The module.
        runner (BlockRunner): Runner of its plans.
    """
    cls = type(module)
    if not isinstance(module, FusedBlock):
        replace_class(module, cls, fused_class(cls))
    # Bypasses the checks of nn.Module.__setattr__.
    module.__dict__['_fused'] = runner


def unfuse(module):
    """Give a fused block its plain class again, in place.

    Args:
        module (nn.Module): The block.
    """
    module.__dict__.pop('_fused', None)
    plain = module.plain_class
    replace_class(module, fused_class(plain), plain)
