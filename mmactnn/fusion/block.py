"""Classes of fused blocks, whose forward pass runs a plan in training."""

import torch

from ..functional import call_in_scope, unscoped_class
from ..modules.class_swap import WithForward, replace_class
from ..modules.execution import refuse_script
from ..modules.function_mode import call_outside


class FusedBlock(WithForward):
    """Mixin of the classes of fused blocks.

    Their forward pass runs the plan where the result is the same and no hook
    misses a call, and the parent's otherwise.
    """

    __prepare_scriptable__ = refuse_script

    @staticmethod
    def run_forward(cls, module, *args, **kwargs):
        """See the base class."""
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
        replace_class(module, cls, FusedBlock.of(cls))
    # Bypasses the checks of nn.Module.__setattr__.
    module.__dict__['_fused'] = runner


def unfuse(module):
    """Give a fused block its plain class again, in place.

    Args:
        module (nn.Module): The block.
    """
    module.__dict__.pop('_fused', None)
    plain = module.plain_class
    replace_class(module, FusedBlock.of(plain), plain)
