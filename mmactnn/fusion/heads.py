"""Dense heads whose towers of convolutions run as one each."""

from torch import nn

from ..ops import is_input, source_of_input
from .base import Fusion
from .blocks import FusedConvModule
from .chain import ChainRunner, Layers, count_large
from .watched import has_hooks


class Levels:
    """Runs the layers of a head with two outputs for each of several levels.

    As one chain for all but the largest ones, if these or what is made of
    them are too large.
    """

    def __init__(self):
        # Each remembers for how many.
        self._chains = {}

    def __call__(self, layers, feats, run_level):
        """Run the layers.

        Args:
            layers (Sequence[Layers], optional): The layers, of two ends;
                None if they do not run as a chain.
            feats (Sequence[Tensor[N, C, H, W]]): The levels, the largest
                first.
            run_level (Callable): Runs the layers for one level, and returns
                both outputs.

        Returns:
            tuple[list[Tensor[N, O, H, W]], list[Tensor[N, P, H, W]]]: The
            outputs, as heads of MMDetection return them.
        """
        alone = len(feats) if layers is None else count_large(feats)
        outputs = [run_level(x) for x in feats[:alone]]
        while alone < len(feats):
            rest = list(feats[alone:])
            run_chain = self._chains.setdefault(
                len(rest), ChainRunner(for_each=True)
            )
            flat = run_chain(layers, rest)
            if run_chain.too_large:
                # What the levels make is.
                outputs.append(run_level(rest[0]))
                alone += 1
                continue
            if flat is None:
                outputs += [run_level(x) for x in rest]
            else:
                outputs += zip(flat[::2], flat[1::2])
            break
        return tuple(map(list, zip(*outputs)))


class FusedRetinaHead(Fusion):
    """MMDetection's ``RetinaHead``, and what computes as it does.

    Of small feature maps a tower takes the host longer than the GPU. The
    ``ConvModule`` of a tower are fused by themselves; this runs both towers,
    with the convolutions behind them, as one chain of all levels but those
    that are large, of which each tower is one.

    Args:
        module (nn.Module): The head.
    """

    def __init__(self, module):
        super().__init__(module)
        self._run_levels = Levels()
        self._run_towers = ChainRunner(), ChainRunner()

    def keep(self, is_norm, is_relu):
        """See the base class."""
        convs = [*self.module.cls_convs, *self.module.reg_convs]
        return self if _are_rectified(convs, is_relu) else None

    def __call__(self, feats):
        """See ``RetinaHead``."""
        if not self.is_active:
            return self._unfused(feats)
        head = self.module
        towers = (
            (*head.cls_convs, head.retina_cls),
            (*head.reg_convs, head.retina_reg),
        )
        layers = [_tower_layers(tower) for tower in towers]

        def run_level(x):
            return [
                self._run_tower(k, tower, layers[k], x)
                for k, tower in enumerate(towers)
            ]

        both = None if None in layers else _side_by_side(layers)
        return self._run_levels(both, feats, run_level)

    def _run_tower(self, k, tower, layers, x):
        if layers is not None:
            outputs = self._run_towers[k](layers, [x])
            if outputs is not None:
                return outputs[0]
        for module in tower:
            x = module(x)
        return x


def _are_rectified(convs, is_relu):
    """Whether there are ``ConvModule``, and each ends with a ReLU."""
    relus = [getattr(conv, 'activate', None) for conv in convs]
    return bool(relus) and all(map(is_relu, relus))


def _tower_layers(tower):
    """The layers of a tower; None if one of its modules does more."""
    *convs, last = tower
    layers = _row_of_layers(convs)
    if layers is None:
        return None
    return [*layers, Layers(last, None, None, len(layers) - 1)]


def _row_of_layers(convs):
    """The layers of ``ConvModule`` in a row; None if one of them does more."""
    if not all(map(_runs_all, convs)):
        return None
    layers = []
    for conv in convs:
        own = conv.forward.layers
        if layers:
            own = own._replace(source=len(layers) - 1)
        layers.append(own)
    return layers


def _side_by_side(towers):
    """The layers of towers of one input."""
    layers = []
    for tower in towers:
        first = len(layers)
        for layer in tower:
            if not is_input(layer.source):
                layer = layer._replace(source=layer.source + first)
            layers.append(layer)
    return layers


def _runs_all(conv):
    """Whether all that a module does is to run its layers."""
    fusion = vars(conv).get('forward')
    return (
        isinstance(fusion, FusedConvModule)
        and fusion.runs_all
        and not has_hooks(conv)
    )


class FusedRPNHead(Fusion):
    """MMDetection's ``RPNHead`` whose ReLU is a layer.

    Its three convolutions run as one chain of all levels but those that are
    large.

    Args:
        module (nn.Module): The head.
    """

    def __init__(self, module):
        super().__init__(module)
        self._run_levels = Levels()
        self._relu = module._modules.get('relu')

    @property
    def relus(self):
        """See the base class."""
        return [self._relu]

    def adopt(self, layers):
        """See the base class."""
        self._relu = layers.get('relu', self._relu)

    def keep(self, is_norm, is_relu):
        """See the base class."""
        alone = isinstance(self.module.rpn_conv, nn.Conv2d)
        return self if alone and is_relu(self._relu) else None

    def __call__(self, feats):
        """See ``RPNHead``."""
        modules = self.module._modules
        if not self.is_active or 'relu' not in modules:
            return self._unfused(feats)
        conv, relu = modules['rpn_conv'], modules['relu']
        layers = [
            Layers(conv, None, relu, source_of_input(0)),
            Layers(modules['rpn_cls'], None, None, 0),
            Layers(modules['rpn_reg'], None, None, 0),
        ]
        return self._run_levels(layers, feats, self.module.forward_single)


class FusedMaskHead(Fusion):
    """MMDetection's ``FCNMaskHead``, and what computes as it does.

    Its tower runs as one chain where it can.

    Args:
        module (nn.Module): The head.
    """

    def __init__(self, module):
        super().__init__(module)
        self._run_chain = ChainRunner()

    def keep(self, is_norm, is_relu):
        """See the base class."""
        return self if _are_rectified(self.module.convs, is_relu) else None

    def __call__(self, x):
        """See ``FCNMaskHead``."""
        if not self.is_active:
            return self._unfused(x)
        head = self.module
        convs = list(head.convs)
        layers = _row_of_layers(convs)
        outputs = None if layers is None else self._run_chain(layers, [x])
        if outputs is not None:
            (x,) = outputs
        else:
            for conv in convs:
                x = conv(x)
        if head.upsample is not None:
            x = head.upsample(x)
            if head.upsample_method == 'deconv':
                x = head.relu(x)
        return head.conv_logits(x)


# By where their ``forward_single`` is from.
_HEADS = {
    'mmdet.models.dense_heads.retina_head.RetinaHead': FusedRetinaHead,
    'mmdet.models.dense_heads.rpn_head.RPNHead': FusedRPNHead,
    'mmactnn.adapters.detection.QRPNHead': FusedRPNHead,
}


def make_dense_head(module):
    """What computes a head's forward pass; None if it is of no known kind.

    Args:
        module (nn.Module): A head that has its forward pass of
            ``AnchorHead``.
    """
    single = type(module).forward_single
    owner = single.__qualname__.rpartition('.')[0]
    make = _HEADS.get(f'{single.__module__}.{owner}')
    return None if make is None else make(module)
