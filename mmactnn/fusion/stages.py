"""Residual blocks that follow one another and run as one."""

from ..ops import source_of_input
from .blocks import FusedPairs, FusedResidual
from .chain import ChainRunner
from .watched import has_hooks


class FusedStage(FusedPairs):
    """An ``nn.Sequential`` of residual blocks.

    The blocks are fused by themselves; this runs all of them as one chain
    where it can.

    Args:
        module (nn.Module): The stage.
        blocks (Sequence[FusedResidual]): What its blocks can become.
    """

    def __init__(self, module, blocks):
        super().__init__(module, ())
        self._run_chain = ChainRunner()
        self._blocks = blocks

    def keep(self, is_norm, is_relu):
        """See the base class."""
        blocks, self._blocks = self._blocks, None
        whole = all(block.keep(is_norm, is_relu) is block for block in blocks)
        return self if whole else None

    def __call__(self, x):
        """See ``nn.Sequential``."""
        layers = self._layers() if self.is_active else None
        if layers is not None:
            outputs = self._run_chain(layers, [x])
            if outputs is not None:
                return outputs[0]
        return self._unfused(x)

    def _layers(self):
        """The layers of all blocks; None if one of these does more."""
        layers, source = [], source_of_input(0)
        for block in self.module._modules.values():
            fusion = vars(block).get('forward')
            if (
                not isinstance(fusion, FusedResidual)
                or not fusion.is_whole
                or has_hooks(block)
            ):
                return None
            own = fusion.layers(source, len(layers))
            if own is None:
                return None
            layers += own
            source = len(layers) - 1
        return layers
