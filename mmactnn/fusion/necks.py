"""Necks whose convolutions of several feature maps run as one."""

from torch import nn

from ..adapters.fpn import LayeredFPN, run_each, run_fpn
from ..ops import source_of_input
from .base import Fusion
from .chain import ChainRunner, Layers, count_large
from .watched import is_watched

_CONV_MODULE = 'mmcv.cnn.bricks.conv_module', 'ConvModule'


class FusedFPN(Fusion):
    """The ``FPN`` of MMDetection and MMSegmentation.

    The convolutions of its inputs run as one chain where these are small, and
    so do those of its outputs.

    Args:
        module (nn.Module): The neck.
    """

    def __init__(self, module):
        super().__init__(module)
        self._run_laterals = SideBySide()
        self._run_outputs = SideBySide()
        self._known = set(module._modules)

    def adopt(self, layers):
        """See the base class."""
        self._known.update(layers)

    def keep(self, is_norm, is_relu):
        """See the base class."""
        needed = LayeredFPN.make_layers(self.module)
        return self if self._known.issuperset(needed) else None

    def __call__(self, inputs):
        """See ``FPN``."""
        if not self.is_active:
            return self._unfused(inputs)
        return run_fpn(
            self.module, inputs, self._run_laterals, self._run_outputs
        )


class SideBySide:
    """Runs convolutions, each on an input of its own.

    As one chain, but for those of the largest inputs.
    """

    def __init__(self):
        self._run_chain = ChainRunner()

    def __call__(self, convs, inputs):
        """See :func:`mmactnn.adapters.fpn.run_each`; the largest is first."""
        # A part of an nn.ModuleList would be a module of its own.
        convs, alone = list(convs), count_large(inputs)
        rest = inputs[alone:]
        del inputs[alone:]
        outputs = run_each(convs[:alone], inputs)
        if rest:
            layers = [
                Layers(_lone_conv(conv), None, None, source_of_input(n))
                for n, conv in enumerate(convs[alone:])
            ]
            outputs += self._run_chain(layers, rest) or run_each(
                convs[alone:], rest
            )
        return outputs


def _lone_conv(module):
    """The convolution that is all that a module calls; None if it is not."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module
    kind = type(module)
    if (
        (kind.__module__, kind.__qualname__) != _CONV_MODULE
        or is_watched(module)
        or module.with_norm
        or module.with_activation
        or module.with_explicit_padding
    ):
        return None
    return module._modules['conv']
