"""Error of the gradients of compressed training.

It takes a model and one batch of smooth random images, without weight
updates: a classifier of torchvision or the config of a detector or segmentor,
with random weights and ground truth. For every level, after some steps in
which adaptive bits settle:

error  mean over draws of |g^ - g| / |g|, over all parameters
tensors  the same tensor by tensor: root of the mean of the squares of their
         relative errors, weighted by size (as optimizers like Adam see them)
mean   error of the mean of all draws
expected  value of mean if rounding is unbiased: error / sqrt(draws)

and the error of each kind of parameter (class of its layer, name in it), as a
line of json for each level. The exit status is 1 if a level failed.
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
from training.models import build_classifier, is_config
from training.systems import parse_system

_DTYPES = dict(fp16=torch.float16, bf16=torch.bfloat16)
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


def parse_args(argv=None):
    """Read and check the command line."""
    parser = output.make_parser(__doc__)
    add = parser.add_argument
    add('--model', default='resnet50', help='a classifier or a config')
    add('--cfg-options', nargs='+', default=(), metavar='KEY=VALUE')
    add('--levels', nargs='+', default=LEVELS, help='perhaps with :JSON')
    add('--group-size', type=int, default=256, help='elements a range')
    add('--batch-size', type=int, default=32)
    add('--image-size', type=int, default=224)
    add('--amp', choices=_DTYPES, help='dtype of autocast')
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


def build_task(args):
    """A model of fixed weights in training mode, and its loss on a batch."""
    images, labels = make_batch(args)
    torch.manual_seed(0)
    if is_config(args.model):
        # Imported here, as it imports MMEngine, which classifiers do not need.
        from mmactnn.mmlab import synthetic

        config = synthetic.load_config(args.model, args.cfg_options)
        model, compute_loss = synthetic.build_task(config, images)
    else:
        model = build_classifier(args.model).to(args.device).train()

        def compute_loss():
            return F.cross_entropy(model(images), labels)

    # Compressed layers draw other random numbers than torch's.
    for module in model.modules():
        for name in ('p', 'drop_prob', 'dropout'):
            if type(vars(module).get(name)) is float:
                setattr(module, name, 0.0)
    dtype = _DTYPES.get(args.amp)

    def compute():
        torch.manual_seed(0)
        with torch.autocast(args.device, dtype, enabled=dtype is not None):
            return compute_loss()

    return model, compute


def kinds_of(model):
    """Kind of each parameter, by its name."""
    return {
        f'{prefix}.{name}'.strip('.'): f'{type(module).__name__}.{name}'
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }


def gradients(model, compute_loss):
    """Gradients of one step, in float64, by the names of parameters."""
    model.zero_grad()
    compute_loss().backward()
    return {
        name: parameter.grad.double().flatten()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def relative(found, exact, names=None):
    """Norm of the error of gradients over that of the exact ones."""
    names = exact if names is None else names
    found, exact = (torch.cat([g[n] for n in names]) for g in (found, exact))
    return float((found - exact).norm() / exact.norm())


def relative_of_tensors(found, exact):
    """The same of single tensors, see the module."""
    rms = torch.cat(list(exact.values())).square().mean().sqrt()
    # Others are zero but for their rounding, as of keys' biases in attention.
    used = {
        name: gradient
        for name, gradient in exact.items()
        if gradient.square().mean().sqrt() > 1e-6 * rms
    }
    squares = [
        g.numel() * relative(found, exact, [n]) ** 2 for n, g in used.items()
    ]
    return (sum(squares) / sum(g.numel() for g in used.values())) ** 0.5


def measure(args, name, exact):
    """Row of a level, by the exact gradients of a batch."""
    model, compute_loss = build_task(args)
    kinds = kinds_of(model)
    level = parse_system(name).level
    sizes = dict(group_size=args.group_size, num_samples=args.batch_size)
    mmactnn.convert_model(model, level, **sizes)

    def step():
        if level.use_gradient:
            precision = mmactnn.get_precision(model)
            precision.set_samples(range(args.batch_size))
        return gradients(model, compute_loss)

    for _ in range(args.warmup):
        step()
    draws = [step() for _ in range(args.draws)]
    mean = {n: sum(draw[n] for draw in draws) / len(draws) for n in exact}

    def average(error, *names):
        errors = (error(draw, exact, *names) for draw in draws)
        return round(statistics.fmean(errors), 4)

    row = dict(level=name, error=average(relative))
    row['tensors'] = average(relative_of_tensors)
    row['mean'] = round(relative(mean, exact), 4)
    row['expected'] = round(row['error'] / len(draws) ** 0.5, 4)
    with mmactnn.measure_activations(model) as meter:
        compute_loss().backward()
    row['activations_mib'] = round(meter.saved_mib, 1)
    row['ratio'] = round(meter.ratio, 2)
    row['kinds'] = {
        kind: average(relative, [n for n in exact if kinds[n] == kind])
        for kind in sorted({kinds[n] for n in exact})
    }
    with contextlib.suppress(ValueError):  # not an adaptive level
        row['bits'] = mmactnn.get_precision(model).bits
    return row


def main(argv=None):
    """Measure every level, print a json line for each."""
    args = parse_args(argv)
    # Without TF32, whose rounding would hide that of the codes.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = gradients(*build_task(args))
    failures = {}
    for name in args.levels:
        with output.catching(failures, name):
            row = measure(args, name, exact)
            print(json.dumps(row), flush=True)
    output.exit_on_failures(failures)


if __name__ == '__main__':
    main()
