"""Dense heads whose towers of convolutions run as one each."""

from .blocks import FusedConvModule, FusedPairs
from .chain import Layers, run_chain
from .watched import has_hooks

_RETINA_HEAD = 'mmdet.models.dense_heads.retina_head', 'RetinaHead'


class FusedRetinaHead(FusedPairs):
    """MMDetection's ``RetinaHead``, and what computes as it does.

    Of small feature maps a tower takes the host longer than the GPU. The
    ``ConvModule`` of a tower are fused by themselves; this runs those of a
    tower, and the convolution behind them, as one chain where it can.

    Args:
        module (nn.Module): The head.
    """

    def __init__(self, module):
        super().__init__(module, ())

    def keep(self, is_norm, is_relu):
        """See the base class."""
        convs = [*self.module.cls_convs, *self.module.reg_convs]
        fused = [c for c in convs if is_relu(getattr(c, 'activate', None))]
        return self if convs and len(fused) == len(convs) else None

    def __call__(self, feats):
        """See ``RetinaHead``."""
        if not self.is_active:
            return self._unfused(feats)
        outputs = [self._forward_single(x) for x in feats]
        return tuple(map(list, zip(*outputs)))

    def _forward_single(self, x):
        head = self.module
        scores = _run_tower(head.cls_convs, head.retina_cls, x)
        boxes = _run_tower(head.reg_convs, head.retina_reg, x)
        return scores, boxes


def _run_tower(convs, last, x):
    output = None
    if all(map(_runs_all, convs)):
        layers = [conv.forward.layers for conv in convs]
        output = run_chain([*layers, Layers(last, None, None)], x)
    if output is None:
        output = x
        for conv in convs:
            output = conv(output)
        output = last(output)
    return output


def _runs_all(conv):
    """Whether all that a module does is to run its layers."""
    fusion = vars(conv).get('forward')
    return (
        isinstance(fusion, FusedConvModule)
        and fusion.runs_all
        and not has_hooks(conv)
    )


def make_retina_head(module):
    """What computes a head's forward pass; None if it is of another kind.

    Args:
        module (nn.Module): A head of the class ``AnchorHead``.
    """
    single = type(module).forward_single
    if (single.__module__, single.__qualname__.split('.')[0]) != _RETINA_HEAD:
        return None
    return FusedRetinaHead(module)
