"""How far the gradients of compressed training are from exact ones.

A ResNet-50 of torchvision and one batch of smooth random images, no weight
update. For every level, after some steps that let adaptive bits settle:

error  mean over draws of |g^ - g| / |g|, over all parameters
mean   the same of the mean of all draws
expected  what the latter is if rounding is unbiased: error / sqrt(draws)

and the error of each kind of parameter.
"""

import argparse
import json

import torch
import torch.nn.functional as F

import mmactnn
from mmactnn import ops
from training.systems import parse_system

LEVELS = (
    'L1',
    'L2',
    'L2:{"conv": 2, "norm": 2}',
    'L3:{"conv": 4, "norm": 4}',
    'L3',
    # Of fused blocks the convolutions' inputs, the sums and the rectified
    # values at 4 bits, the normalised values before a sum at 3.
    'L3:{"conv": 4, "norm": 3, "rectified": 4}',
    'L3:{"use_gradient": true}',
)


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--levels',
        nargs='+',
        default=list(LEVELS),
        help='levels by name, or varied by json (L3:{"conv": 4})',
    )
    parser.add_argument(
        '--group-size', type=int, default=256, help='elements a range'
    )
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--image-size', type=int, default=224)
    parser.add_argument('--warmup', type=int, default=5, help='steps')
    parser.add_argument('--draws', type=int, default=16)
    parser.add_argument('--device', default='cuda')
    args = parser.parse_args(argv)
    try:
        for name in args.levels:
            _parse_level(name)
        ops.check_format(1, args.group_size)
    except ValueError as error:
        parser.error(str(error))
    return args


def _parse_level(name):
    level = parse_system(name).level
    if level is None:
        raise ValueError(
            f'a level must be one of {", ".join(mmactnn.LEVELS)}, perhaps '
            f'with :JSON, got {name!r}'
        )
    return level


def make_batch(args):
    """Images of several scales of noise, and labels.

    Args:
        args (argparse.Namespace): From :func:`parse_args`.

    Returns:
        tuple[Tensor, Tensor]: Images and labels.
    """
    generator = torch.Generator().manual_seed(1)
    size = args.image_size
    images = sum(
        F.interpolate(
            torch.randn(args.batch_size, 3, s, s, generator=generator),
            size=size,
            mode='bicubic',
        )
        for s in (size // 32, size // 8, size // 2)
    )
    labels = torch.randint(1000, (args.batch_size,), generator=generator)
    return (images / 3**0.5).to(args.device), labels.to(args.device)


def make_model(args):
    """A model of fixed weights in training mode.

    Args:
        args (argparse.Namespace): From :func:`parse_args`.

    Returns:
        nn.Module: The model.
    """
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet50().to(args.device).train()


def gradients(model, images, labels):
    """The gradients of one step.

    Args:
        model (nn.Module): The model.
        images (Tensor[N, 3, H, W]): Images.
        labels (Tensor[N]): Labels.

    Returns:
        dict[str, Tensor]: float64, by name of the parameter.
    """
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    return {name: p.grad.double() for name, p in model.named_parameters()}


def kind(name):
    """The kind of a parameter."""
    if name.startswith('fc'):
        return 'fc'
    if 'conv' in name or name.endswith('downsample.0.weight'):
        return 'conv'
    return 'gamma' if name.endswith('weight') else 'beta'


def relative(found, exact, kinds):
    """Norm of a difference over that of the exact gradient.

    Args:
        found (dict[str, Tensor]): Gradients.
        exact (dict[str, Tensor]): Exact ones.
        kinds (Sequence[str]): Which kinds of parameters count.

    Returns:
        float: The error.
    """
    names = [name for name in exact if kind(name) in kinds]
    difference = sum(
        float((found[n] - exact[n]).square().sum()) for n in names
    )
    return (
        difference / sum(float(exact[n].square().sum()) for n in names)
    ) ** 0.5


def measure(args, name, exact, images, labels):
    """The errors at one level.

    Args:
        args (argparse.Namespace): From :func:`parse_args`.
        name (str): The level.
        exact (dict[str, Tensor]): Exact gradients.
        images (Tensor[N, 3, H, W]): Images.
        labels (Tensor[N]): Labels.

    Returns:
        dict: The row of the table.
    """
    model, level = make_model(args), _parse_level(name)
    mmactnn.convert_model(
        model,
        level,
        group_size=args.group_size,
        num_samples=args.batch_size,
    )

    def step():
        if level.use_gradient:
            precision = mmactnn.get_precision(model)
            precision.set_samples(range(args.batch_size))
        return gradients(model, images, labels)

    for _ in range(args.warmup):
        step()
    kinds = ('conv', 'gamma', 'beta', 'fc')
    draws = [step() for _ in range(args.draws)]
    mean = {key: sum(d[key] for d in draws) / len(draws) for key in exact}

    def error(*which):
        errors = [relative(draw, exact, which) for draw in draws]
        return round(sum(errors) / len(errors), 4)

    row = dict(level=name, error=error(*kinds))
    row['mean'] = round(relative(mean, exact, kinds), 4)
    row['expected'] = round(row['error'] / len(draws) ** 0.5, 4)
    row.update({key: error(key) for key in kinds})
    with mmactnn.measure_activations(model) as meter:
        F.cross_entropy(model(images), labels).backward()
    row.update(activations_mib=round(meter.saved_mib, 1))
    row.update(ratio=round(meter.ratio, 2))
    try:
        row.update(bits=mmactnn.get_precision(model).bits)
    except ValueError:  # not an adaptive level
        pass
    return row


def main():
    """Measure every case, print a json line for each."""
    args = parse_args()
    # Rounding is to be seen, not that of the multiplications.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    images, labels = make_batch(args)
    exact = gradients(make_model(args), images, labels)
    for name in args.levels:
        row = measure(args, name, exact, images, labels)
        print(json.dumps(row), flush=True)


if __name__ == '__main__':
    main()
