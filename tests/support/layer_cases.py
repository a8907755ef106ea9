"""One case for each way that a layer can keep codes of its input."""

import dataclasses

import torch

from mmactnn import (
    QBatchNorm1d,
    QBatchNorm2d,
    QBatchNorm3d,
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
    QGroupNorm,
    QLinear,
    QSyncBatchNorm,
    RoundingGenerator,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer and an input that it takes.

    Attributes:
        cls (type): Class of the layer.
        args (tuple): Of the constructor.
        size (tuple[int]): Of the input, samples first.
        kwargs (dict): Of the constructor.
        call (dict): Further arguments of the layer's call.
    """

    cls: type
    args: tuple
    size: tuple
    kwargs: dict = dataclasses.field(default_factory=dict)
    call: dict = dataclasses.field(default_factory=dict)

    @property
    def linear(self):
        """bool: Whether the layer is linear in its input."""
        return self.cls.kind == 'conv'

    def make(self, device, bits=8, dtype=None):
        """The layer, with parameters that no layer starts with.

        Args:
            device (torch.device): Where to.
            bits (int, optional): Bits a code. Defaults to 8.
            dtype (torch.dtype, optional): Of the parameters.

        Returns:
            CodedLayer: In training mode.
        """
        layer = self.cls(*self.args, bits=bits, **self.kwargs)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        # Rounding that does not depend on the tests before.
        layer.quantizer.generator = RoundingGenerator(seed=0)
        return layer.to(device, dtype)

    def make_input(self, device, dtype=None):
        """An input whose mean is not zero: a lost offset would show."""
        return (torch.randn(self.size) + 0.3).to(device, dtype)


def _convolutions():
    for spatial, plain, transposed in (
        (1, QConv1d, QConvTranspose1d),
        (2, QConv2d, QConvTranspose2d),
        (3, QConv3d, QConvTranspose3d),
    ):
        size = (3, 4, *(7, 5, 6)[:spatial])
        for name, kwargs in {
            'plain': dict(),
            'groups': dict(padding=1, groups=2, bias=False),
            'depthwise': dict(padding=1, stride=2, groups=4),
            'dilation': dict(padding=2, dilation=2),
        }.items():
            yield (
                f'{plain.__name__}, {name}',
                Case(plain, (4, 8, 3), size, kwargs),
            )
            yield (
                f'{transposed.__name__}, {name}',
                Case(transposed, (4, 8, 3), size, kwargs),
            )
        for name, kwargs in {
            'valid': dict(padding='valid'),
            'same': dict(padding='same', dilation=2),
            'reflect': dict(padding=2, padding_mode='reflect'),
            'replicate': dict(padding=1, padding_mode='replicate'),
            'circular': dict(padding='same', padding_mode='circular'),
        }.items():
            yield (
                f'{plain.__name__}, {name}',
                Case(plain, (4, 8, 3), size, kwargs),
            )
        yield (
            f'{plain.__name__}, same, odd',
            Case(plain, (4, 8, 2), size, dict(padding='same')),
        )
        yield (
            f'{transposed.__name__}, output padding',
            Case(
                transposed, (4, 8, 3), size, dict(stride=2, output_padding=1)
            ),
        )
        stride = dict(stride=3, padding=1)
        sizes = [3 * (n - 1) + 1 + spatial % 2 for n in size[2:]]
        yield (
            f'{transposed.__name__}, output size',
            Case(transposed, (4, 8, 3), size, stride, dict(output_size=sizes)),
        )


CASES = {
    **dict(_convolutions()),
    'QLinear': Case(QLinear, (9, 5), (7, 9)),
    'QLinear, no bias': Case(QLinear, (9, 5), (7, 9), dict(bias=False)),
    'QLinear, 3-d': Case(QLinear, (9, 5), (3, 5, 9)),
    'QLinear, 4-d': Case(QLinear, (5, 9), (3, 5, 2, 5)),
    'QBatchNorm1d, 2-d': Case(QBatchNorm1d, (5,), (33, 5)),
    'QBatchNorm1d, 3-d': Case(QBatchNorm1d, (5,), (3, 5, 17)),
    'QBatchNorm2d': Case(QBatchNorm2d, (4,), (3, 4, 9, 5)),
    'QBatchNorm3d': Case(QBatchNorm3d, (4,), (3, 4, 3, 5, 4)),
    'QBatchNorm3d, no affine': Case(
        QBatchNorm3d, (4,), (3, 4, 3, 5, 4), dict(affine=False)
    ),
    'QBatchNorm1d, no statistics': Case(
        QBatchNorm1d, (5,), (3, 5, 17), dict(track_running_stats=False)
    ),
    'QSyncBatchNorm': Case(QSyncBatchNorm, (4,), (3, 4, 9, 5)),
    'QSyncBatchNorm, 2-d': Case(
        QSyncBatchNorm, (5,), (33, 5), dict(momentum=None)
    ),
    'QSyncBatchNorm, 5-d': Case(QSyncBatchNorm, (4,), (3, 4, 3, 5, 4)),
    'QGroupNorm, 2-d': Case(QGroupNorm, (2, 32), (7, 32)),
    'QGroupNorm, 3-d': Case(QGroupNorm, (3, 6), (3, 6, 17)),
    'QGroupNorm': Case(QGroupNorm, (2, 6), (3, 6, 9, 5)),
    'QGroupNorm, one group': Case(QGroupNorm, (1, 6), (3, 6, 9, 5)),
    'QGroupNorm, no affine': Case(
        QGroupNorm, (3, 6), (3, 6, 9, 5), dict(affine=False)
    ),
    'QGroupNorm, 5-d': Case(QGroupNorm, (2, 4), (3, 4, 3, 5, 4)),
}

# Cases of classes that do the same in several numbers of dimensions.
FAMILIES = {}
for _name, _case in CASES.items():
    _family = _case.cls.__name__.rstrip('123d')
    FAMILIES.setdefault(_family, {})[_name] = _case

# One case a class, for what does not depend on the arguments.
CLASSES = {}
for _case in CASES.values():
    CLASSES.setdefault(_case.cls.__name__, _case)


def gaps(x):
    """The same values with gaps in memory."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def channels_last(x):
    """The same values with the channels innermost, at any rank."""
    if x.dim() < 3:
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS = {
    'contiguous': lambda x: x,
    'channels_last': channels_last,
    'gaps': gaps,
    'slice': lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    'samples inside': lambda x: x.movedim(0, 1).contiguous().movedim(1, 0),
}
