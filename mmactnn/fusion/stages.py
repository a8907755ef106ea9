"""Residual blocks that follow one another and run as one."""

from ..ops import source_of_input
from .base import Fusion
from .blocks import FusedResidual
from .chain import ChainRunner, count_large
from .watched import has_hooks


class FusedStage(Fusion):
    """An ``nn.Sequential`` of residual blocks.

    The blocks are fused by themselves; this runs as many of the last ones as
    it can as one chain.

    Args:
        module (nn.Module): The stage.
        blocks (Sequence[FusedResidual]): What its blocks can become.
    """

    def __init__(self, module, blocks):
        super().__init__(module)
        # By the index of the first block.
        self._chains = {}
        self._blocks = blocks

    def keep(self, is_norm, is_relu):
        """See the base class."""
        blocks, self._blocks = self._blocks, None
        whole = all(block.keep(is_norm, is_relu) is block for block in blocks)
        return self if whole else None

    def __call__(self, x):
        """See ``nn.Sequential``."""
        if not self.is_active:
            return self._unfused(x)
        blocks = list(self.module._modules.values())
        for i, block in enumerate(blocks):
            # Inputs become smaller; the first may be too large.
            if not count_large([x]):
                layers = _all_layers(blocks[i:])
                if layers is not None:
                    run_chain = self._chains.setdefault(i, ChainRunner())
                    outputs = run_chain(layers, [x])
                    if outputs is not None:
                        return outputs[0]
            x = block(x)
        return x


def _all_layers(blocks):
    """The layers of blocks in a row; None if one of these does more."""
    layers, source = [], source_of_input(0)
    for block in blocks:
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
