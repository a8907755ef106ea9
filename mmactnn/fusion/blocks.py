"""What computes the forward pass of a block in its place."""

from typing import NamedTuple

from torch import nn

from ..layers.norm import Fusing
from ..ops import source_of_input
from .base import Fusion
from .chain import ChainRunner, Layers
from .frozen import finish_frozen, is_frozen
from .members import may_be_passed_over, may_join
from .watched import is_only_reader, is_watched


class Pair(NamedTuple):
    """Names of a normalisation and its neighbours in a module.

    Attributes:
        conv (str, optional): The convolution whose output it takes, and
            nothing else does.
        norm (str): The normalisation.
        relu (str): The ReLU that follows.
    """

    conv: str | None
    norm: str
    relu: str


class FusedPairs(Fusion):
    """A module whose forward pass calls a ReLU right after a normalisation.

    Its class's own forward pass runs; as long as it does, the normalisations
    rectify, and the ReLUs pass on what is rectified already.

    Args:
        module (nn.Module): The module.
        pairs (Sequence[Pair]): Its normalisations that a ReLU follows.
    """

    def __init__(self, module, pairs):
        super().__init__(module)
        self.pairs = tuple(pairs)

    @property
    def norms(self):
        """See the base class."""
        return [getattr(self.module, pair.norm) for pair in self.pairs]

    def keep(self, is_norm, is_relu):
        """See the base class."""
        self.pairs = tuple(
            pair
            for pair in self.pairs
            if is_norm(getattr(self.module, pair.norm))
            and is_relu(getattr(self.module, pair.relu))
        )
        return self if self.pairs else None

    def __call__(self, *args, **kwargs):
        """See the module's own ``forward``."""
        if not self.is_active:
            return self._unfused(*args, **kwargs)
        norms = self._fuse()
        try:
            return self._unfused(*args, **kwargs)
        finally:
            _part(norms)

    def _fuse(self):
        """Let the normalisations take part, but where somebody looks.

        Returns:
            list[nn.Module]: Those that do, until :func:`_part`.
        """
        modules = self.module._modules
        norms = []
        for pair in self.pairs:
            norm, relu = modules[pair.norm], modules[pair.relu]
            if may_join(norm) and may_be_passed_over(relu):
                _join(norm, True, modules.get(pair.conv))
                norms.append(norm)
        return norms


class FusedConvModule(FusedPairs):
    """MMCV's ``ConvModule``, which may be told to leave out its ReLU.

    Args:
        module (nn.Module): The module, of a convolution, perhaps a
            normalisation, and ReLU, in this order.
    """

    def __init__(self, module):
        pairs = []
        if module.with_norm:
            pairs.append(Pair('conv', module.norm_name, 'activate'))
        super().__init__(module, pairs)
        self._run_chain = ChainRunner()

    @property
    def relus(self):
        """See the base class."""
        return [] if self.module.with_norm else [self.module.activate]

    def rectified_bits(self, level):
        """See the base class."""
        if not self.module.with_norm:
            return level.rectified
        return max(level.rectified, level.head or level.rectified)

    def keep(self, is_norm, is_relu):
        """See the base class."""
        if self.module.with_norm:
            return super().keep(is_norm, is_relu)
        return self if is_relu(self.module.activate) else None

    def __call__(self, x, activate=True, norm=True):
        """See ``ConvModule``."""
        if not activate:
            return self._unfused(x, activate, norm)
        if norm and self.runs_all:
            outputs = self._run_chain([self.layers], [x])
            if outputs is not None:
                return outputs[0]
        return super().__call__(x, activate, norm)

    @property
    def runs_all(self):
        """bool: Whether it is trained, layer by layer.

        MMCV can merge a normalisation in evaluation mode into the
        convolution's weight.
        """
        merges = self.module.efficient_conv_bn_eval_forward is not None
        return self.is_active and not merges

    @property
    def layers(self):
        """Layers: What the module is made of."""
        modules = self.module._modules
        norm = modules.get(self.module.norm_name)
        return Layers(
            modules['conv'], norm, modules['activate'], source_of_input(0)
        )


class FusedResidual(FusedPairs):
    """A residual block: ``relu(norm(conv(...)) + shortcut)``.

    Args:
        module (nn.Module): The block.
        convs (Sequence[str]): Names of its convolutions, in their order.
        norms (Sequence[str]): Names of the normalisations that follow them.
    """

    def __init__(self, module, convs, norms):
        inner = zip(convs[:-1], norms[:-1])
        super().__init__(module, [Pair(*names, 'relu') for names in inner])
        self.last_conv = convs[-1]
        self.last_norm = norms[-1]
        self._run_chain = ChainRunner()
        self._run_shortcut_chain = ChainRunner()

    @property
    def norms(self):
        """list[nn.Module]: All normalisations that are fused."""
        last = getattr(self.module, self.last_norm)
        return [*super().norms, last, *(n for _, n in self._shortcut())]

    def keep(self, is_norm, is_relu):
        """See the base class."""
        if is_relu(self.module.relu) and all(map(is_norm, self.norms)):
            return self
        return FusedPairs(self.module, self.pairs).keep(is_norm, is_relu)

    @property
    def is_whole(self):
        """bool: Whether all of the block runs fused now."""
        modules = self.module._modules
        return (
            self.is_active
            and may_join(modules[self.last_norm])
            and may_be_passed_over(modules['relu'])
        )

    def __call__(self, x):
        """See the block's own ``forward``."""
        if is_frozen(self.module, x):
            return self._run_frozen(x)
        if not self.is_whole:
            return super().__call__(x)
        if x.grad_fn is not None:
            return self._run(x)
        # What frozen stages return is read by the shortcut, too.
        cache = self.module._modules[self.last_norm].quantizer.cache
        with cache.in_block(x):
            return self._run(x)

    def _run(self, x):
        # First, though the block's own forward pass has it last: the backward
        # pass then comes to it when the other branch's gradients are gone.
        shortcut = self._run_shortcut(x)
        inputs = [x] if shortcut is x else [x, shortcut]
        added = source_of_input(len(inputs) - 1)
        layers = self._main_layers(source_of_input(0), added, 0)
        outputs = self._run_chain(layers, inputs)
        if outputs is not None:
            return outputs[0]
        norms = super()._fuse()
        try:
            out = x
            for conv, norm, relu, *_ in layers[:-1]:
                out = relu(norm(conv(out)))
            last_conv, last_norm, relu, *_ = layers[-1]
            out = last_conv(out)
        finally:
            _part(norms)
        if last_norm.fuses(out, shortcut):
            fusing = Fusing(True, is_only_reader(last_conv))
            return last_norm.norm_act(out, fusing, shortcut)
        return relu(last_norm(out) + shortcut)

    def _run_frozen(self, x):
        modules = self.module._modules
        relu, shortcut = modules['relu'], x
        downsample = modules.get('downsample')
        if downsample is not None:
            pair = _conv_and_norm(downsample)
            if pair is None:
                shortcut = downsample(x)
            else:
                conv, norm = pair
                shortcut = finish_frozen(conv(x), conv, norm, None)
        for name, norm, _ in self.pairs:
            conv = modules[name]
            x = finish_frozen(conv(x), conv, modules[norm], relu)
        conv, norm = modules[self.last_conv], modules[self.last_norm]
        return finish_frozen(conv(x), conv, norm, relu, shortcut)

    def layers(self, source, first):
        """All layers of the block, behind others.

        Args:
            source (int): What it reads, see :class:`Layers`.
            first (int): How many layers there are before its.

        Returns:
            list[Layers], optional: None if the block does more, or runs in
            another way.
        """
        downsample = self.module._modules.get('downsample')
        if downsample is None:
            return self._main_layers(source, source, first)
        pair = _conv_and_norm(downsample)
        if pair is None:
            return None
        shortcut = Layers(*pair, None, source)
        return [shortcut, *self._main_layers(source, first, first + 1)]

    def _main_layers(self, source, added, first):
        """The layers but for those of the shortcut."""
        modules = self.module._modules
        relu, layers = modules['relu'], []
        for conv, norm, _ in self.pairs:
            layers.append(Layers(modules[conv], modules[norm], relu, source))
            source = first + len(layers) - 1
        conv, norm = modules[self.last_conv], modules[self.last_norm]
        return [*layers, Layers(conv, norm, relu, source, added)]

    def _run_shortcut(self, x):
        downsample = self.module._modules.get('downsample')
        if downsample is None:
            return x
        pair = _conv_and_norm(downsample)
        if pair is not None:
            layers = Layers(*pair, None, source_of_input(0))
            outputs = self._run_shortcut_chain([layers], [x])
            if outputs is not None:
                return outputs[0]
        norms = self._fuse_shortcut()
        try:
            return downsample(x)
        finally:
            _part(norms)

    def _fuse(self):
        """See the base class; the shortcut's are not rectified."""
        return super()._fuse() + self._fuse_shortcut()

    def _fuse_shortcut(self):
        norms = []
        for conv, norm in self._shortcut():
            if may_join(norm):
                _join(norm, False, conv)
                norms.append(norm)
        return norms

    def _shortcut(self):
        """Normalisations of the shortcut, after what each of them reads."""
        shortcut = self.module._modules.get('downsample')
        if not isinstance(shortcut, nn.Sequential):
            return []
        layers = list(shortcut._modules.values())
        return [
            (conv, norm)
            for conv, norm in zip([None, *layers], layers)
            if isinstance(norm, nn.modules.batchnorm._BatchNorm)
        ]


def _conv_and_norm(shortcut):
    """What a shortcut is made of, if that is what it is made of.

    None also if somebody looks at it.
    """
    if not isinstance(shortcut, nn.Sequential) or is_watched(shortcut):
        return None
    layers = tuple(shortcut._modules.values())
    classes = nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm
    fits = len(layers) == 2 and all(map(isinstance, layers, classes))
    return layers if fits else None


def _join(norm, relu, conv):
    """Let a normalisation take part in a block that is fused."""
    # Straight into the instance: that of nn.Module takes its time.
    norm.__dict__['fusing'] = Fusing(relu, is_only_reader(conv))


def _part(norms):
    """Let normalisations run by themselves again."""
    for norm in norms:
        norm.__dict__.pop('fusing', None)
