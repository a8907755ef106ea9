"""Fused blocks: modules whose class runs a plan in training."""

import functools

import torch

from ..modules.class_swap import replace_class
from ..modules.execution import call_outside_graph, refuse_script


class FusedBlock:
    """Mixin of the classes that fused blocks have.

    The class has the name, and with it the signature and the checks by name,
    of the one that it stands for; its forward pass runs the plan where nobody
    can tell, and that of its parent otherwise.

    Attributes:
        plain_class (type): Class of the block before it was fused.
    """

    plain_class = None
    __prepare_scriptable__ = refuse_script

    def __reduce_ex__(self, protocol):
        return _make_instance, (self.plain_class,), self.__getstate__()


@functools.cache
def fused_class(cls):
    """The class that a fused block has.

    Args:
        cls (type): Its class before.

    Returns:
        type: A subclass, always the same one.
    """

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        # A bound method may outlive a conversion: MMEngine's activation
        # checkpointing keeps one.
        if getattr(self, '_fused', None) is None:
            return cls.forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            if not self.training:
                return cls.forward(self, *args, **kwargs)
            return call_outside_graph(_run, self, cls, args, kwargs)
        return _run(self, cls, args, kwargs)

    return type(cls)(
        cls.__name__,
        (FusedBlock, cls, *cls.__bases__),
        dict(
            forward=forward,
            plain_class=cls,
            __module__=cls.__module__,
            __qualname__=cls.__qualname__,
            __doc__=cls.__doc__,
        ),
    )


def _run(module, cls, args, kwargs):
    found = module._fused.find_plan(module, cls, args, kwargs)
    if found is None:
        return cls.forward(module, *args, **kwargs)
    plan, inputs = found
    del args
    return module._fused.run(module, plan, inputs)


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
    """The class that a module has when it is not fused.

    Args:
        module (nn.Module): The module.

    Returns:
        type: Its class, or the one before it was fused.
    """
    if isinstance(module, FusedBlock):
        return module.plain_class
    return type(module)


def fuse(module, runner):
    """Make a module a fused block, in place.

    Args:
        module (nn.Module): The module.
        runner (BlockRunner): What runs it.
    """
    cls = type(module)
    if not isinstance(module, FusedBlock):
        replace_class(module, cls, fused_class(cls))
    # Past nn.Module's own check of what is assigned.
    module.__dict__['_fused'] = runner


def unfuse(module):
    """Give a fused block its plain class again, in place.

    Args:
        module (nn.Module): The block.
    """
    module.__dict__.pop('_fused', None)
    plain = module.plain_class
    replace_class(module, fused_class(plain), plain)
