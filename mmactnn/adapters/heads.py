"""Adapters of MMDetection's dense heads over feature levels."""

from mmdet.models.dense_heads import RetinaHead, RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead

from ..fusion.chain import ChainLayer, ChainRunner
from ..fusion.plan import append_layers
from ..layers import QReLU
from ..ops import source_of_input
from ..registry import register_adapter
from .losses import LossAdapter
from .parallel import HeadRunner, layers_of_sequence


@register_adapter(RPNHead, fingerprints=['b8c6347d9a2ed90e'])
class QRPNHead(LossAdapter, RPNHead):
    """``RPNHead`` whose ReLU is a layer.

    Its three convolutions run as one chain over all small levels.

    Args:
        *args: As ``RPNHead``.
        **kwargs: As ``RPNHead``.
    """

    replaces = ('forward', 'forward_single')
    coded_relus = ('relu',)

    @classmethod
    def make_layers(cls, module):
        """See the base class."""
        return dict(relu=QReLU(), **super().make_layers(module))

    def adapted_forward(self, x):
        """See ``RPNHead``."""
        modules = self._modules
        conv, layers = modules['rpn_conv'], None
        if not len(conv._modules) and self.may_chain():
            layers = [
                ChainLayer(conv, None, modules['relu'], source_of_input(0)),
                ChainLayer(modules['rpn_cls'], None, None, 0),
                ChainLayer(modules['rpn_reg'], None, None, 0),
            ]
        return self.get_runner('levels', HeadRunner)(
            layers, x, self._run_level
        )

    def _run_level(self, x):
        x = self.relu(self.rpn_conv(x))
        return self.rpn_cls(x), self.rpn_reg(x)


@register_adapter(RetinaHead, fingerprints=['2c082bccd5047d98'])
class QRetinaHead(LossAdapter, RetinaHead):
    """``RetinaHead`` whose towers run as one chain.

    For small feature maps the host limits the speed of a tower. Both towers,
    with the convolutions behind them, run as one chain over all small levels.
    For a large level each tower is a chain.

    Args:
        *args: As ``RetinaHead``.
        **kwargs: As ``RetinaHead``.
    """

    replaces = ('forward', 'forward_single')

    def adapted_forward(self, x):
        """See ``RetinaHead``."""
        towers = (
            (*self.cls_convs, self.retina_cls),
            (*self.reg_convs, self.retina_reg),
        )
        layers = [None, None]
        if self.may_chain():
            layers = [layers_of_sequence(tower) for tower in towers]
        both = None
        if None not in layers:
            both = []
            for tower in layers:
                append_layers(both, tower, source_of_input(0))

        def run_level(level):
            return [
                self._run_tower(k, tower, layers[k], level)
                for k, tower in enumerate(towers)
            ]

        return self.get_runner('levels', HeadRunner)(both, x, run_level)

    def _run_tower(self, k, tower, layers, x):
        if layers is not None:
            outputs = self.get_runner(k, ChainRunner)(layers, [x])
            if outputs is not None:
                return outputs[0]
        for module in tower:
            x = module(x)
        return x


@register_adapter(BaseDenseHead)
class QDenseHead(LossAdapter, BaseDenseHead):
    """Dense head whose losses keep the gradients of its outputs alone.

    Args:
        *args: As ``BaseDenseHead``.
        **kwargs: As ``BaseDenseHead``.
    """
