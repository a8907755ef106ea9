"""Error of the gradients of compressed training.

It takes a ResNet-50 of torchvision and one batch of smooth random images,
without weight updates. For every level, after some steps in which adaptive
bits settle:

error  mean over draws of |g^ - g| / |g|, over all parameters
mean   the same for the mean of all draws
expected  value of mean if rounding is unbiased: error / sqrt(draws)

and the error of each kind of parameter, as a line of json for each level. The
exit status is 1 if a level failed.
"""

import contextlib
import json
import statistics

import torch
import torch.nn.functional as F

import mmactnn
from mmactnn import ops
from mmactnn.ops.rounding import check_rounding
from shared import output
from training.models import build_classifier
from training.systems import parse_system

LEVELS = (
    'L1',
    'L2',
    'L2:{"conv": 2, "norm": 2}',
    'L3:{"conv": 4, "norm": 4}',
    'L3',
    # In fused blocks inputs of convolutions, sums and rectified values have 4
    # bits, normalised values before a sum 3.
    'L3:{"conv": 4, "norm": 3, "rectified": 4}',
    'L3:{"use_gradient": true}',
)
KINDS = ('conv', 'gamma', 'beta', 'fc')


def parse_args(argv=None):
    """Read and check the command line."""
    parser = output.make_parser(__doc__)
    add = parser.add_argument
    add('--levels', nargs='+', default=LEVELS, help='perhaps with :JSON')
    add('--group-size', type=int, default=256, help='elements a range')
    add('--batch-size', type=int, default=32)
    add('--image-size', type=int, default=224)
    add('--warmup', type=int, default=5, help='steps')
    add('--draws', type=int, default=16)
    add('--device', default='cuda')
    args = parser.parse_args(argv)
    output.check_positive(parser, args, 'batch_size', 'image_size', 'draws')
    try:
        ops.check_format(1, args.group_size)
        systems = {name: parse_system(name) for name in args.levels}
        for name, system in systems.items():
            if system.level is not None:
                of = f' of {name}'
                check_rounding(system.level.rounding, args.group_size, of)
    except ValueError as error:
        parser.error(str(error))
    for name, system in systems.items():
        if system.level is None:
            levels = ', '.join(mmactnn.LEVELS)
            parser.error(f'a level must be one of {levels}, got {name!r}')
    return args


def make_batch(args):
    """Images of several scales of noise, and labels."""
    generator, images = torch.Generator().manual_seed(1), 0
    for scale in (32, 8, 2):
        size = (args.batch_size, 3, *2 * (args.image_size // scale,))
        noise = torch.randn(size, generator=generator)
        images = images + F.interpolate(noise, args.image_size, mode='bicubic')
    labels = torch.randint(1000, (args.batch_size,), generator=generator)
    return (images / 3**0.5).to(args.device), labels.to(args.device)


def make_model(args):
    """A model of fixed weights in training mode."""
    torch.manual_seed(0)
    return build_classifier('resnet50').to(args.device).train()


def gradients(model, images, labels):
    """Gradients of one step, as a float64 vector of each kind."""
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    parts = {kind: [] for kind in KINDS}
    for name, parameter in model.named_parameters():
        parts[find_kind(name)].append(parameter.grad.double().flatten())
    return {kind: torch.cat(vectors) for kind, vectors in parts.items()}


def find_kind(name):
    """Kind of a parameter, one of ``KINDS``."""
    if name.startswith('fc'):
        return 'fc'
    if 'conv' in name or name.endswith('downsample.0.weight'):
        return 'conv'
    return 'gamma' if name.endswith('weight') else 'beta'


def relative(found, exact, kinds=KINDS):
    """Norm of the error of gradients over that of the exact ones."""
    found, exact = (torch.cat([g[k] for k in kinds]) for g in (found, exact))
    return float((found - exact).norm() / exact.norm())


def measure(args, name, exact, images, labels):
    """Row of a level, by the exact gradients of a batch."""
    model, level = make_model(args), parse_system(name).level
    sizes = dict(group_size=args.group_size, num_samples=args.batch_size)
    mmactnn.convert_model(model, level, **sizes)

    def step():
        if level.use_gradient:
            precision = mmactnn.get_precision(model)
            precision.set_samples(range(args.batch_size))
        return gradients(model, images, labels)

    for _ in range(args.warmup):
        step()
    draws = [step() for _ in range(args.draws)]
    mean = {kind: sum(d[kind] for d in draws) / len(draws) for kind in KINDS}

    def error(*kinds):
        errors = (relative(draw, exact, kinds) for draw in draws)
        return round(statistics.fmean(errors), 4)

    row = dict(level=name, error=error(*KINDS))
    row['mean'] = round(relative(mean, exact), 4)
    row['expected'] = round(row['error'] / len(draws) ** 0.5, 4)
    row.update({kind: error(kind) for kind in KINDS})
    with mmactnn.measure_activations(model) as meter:
        F.cross_entropy(model(images), labels).backward()
    row['activations_mib'] = round(meter.saved_mib, 1)
    row['ratio'] = round(meter.ratio, 2)
    with contextlib.suppress(ValueError):  # not an adaptive level
        row['bits'] = mmactnn.get_precision(model).bits
    return row


def main(argv=None):
    """Measure every level, print a json line for each."""
    args = parse_args(argv)
    # Without TF32, whose rounding would hide that of the codes.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    images, labels = make_batch(args)
    exact = gradients(make_model(args), images, labels)
    failures = {}
    for name in args.levels:
        with output.catching(failures, name):
            row = measure(args, name, exact, images, labels)
            print(json.dumps(row), flush=True)
    output.exit_on_failures(failures)


if __name__ == '__main__':
    main()
