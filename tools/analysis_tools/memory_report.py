"""Memory that layers keep for the backward pass, exact and compressed.

    python tools/analysis_tools/memory_report.py CONFIG [CONFIG ...]

Builds the model of a config, converts it as its ActNNHook would, runs a
forward pass on random images and lists the tensors that autograd keeps. No
data set, weights or GPU are needed, except by models with ops that only GPUs
have. Configs of installed packages are named by the package, as in
mmdet::retinanet/retinanet_r50_fpn_1x_coco.py.

exact      bytes that torch would keep
kept       bytes that are kept
losses     saved by code of a package called losses, by methods such as
           loss_by_feat, or once the model has returned; counted apart
left       kept uncompressed, losses excluded
left / exact  its share in exact, losses excluded from both
left / kept   its share in kept, losses excluded from both

A tensor counts once, for the layer that keeps it first: another layer that has
its own codes of the same tensor is listed with exact 0. Parameters and buffers
do not count. MiB = 2^20 bytes.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import traceback
from pathlib import Path

import torch
from mmengine.logging import MMLogger
from rich.console import Console
from rich.table import Table
from rich.text import Text

import mmactnn
from mmactnn.codes.units import MIB
from mmactnn.config import DEFAULT_LEVEL
from mmactnn.memory import Breakdown, Category, Locator
from mmactnn.mmlab import synthetic
from mmactnn.names import require_named_layers

_DTYPES = dict(fp16=torch.float16, bf16=torch.bfloat16)
_HOOK_TYPES = ('ActNNHook', 'mmactnn.ActNNHook')
_HOOK_SETTINGS = ('level', 'include', 'exclude', 'group_size')

# Width of a line without a terminal, and of a note, in characters.
_WIDTH = 180
_NOTE_WIDTH = 60

# Exit codes for users' mistakes, for models that cannot be built or trained,
# and for those that only a GPU can run.
USAGE = 2
FAILED = 3
NEEDS_GPU = 4

# Parts of the messages of ops that only a GPU has.
_NEEDS_GPU = ('implementation for device cpu', 'CUDA', 'cuda')


@dataclasses.dataclass(frozen=True)
class Report:
    """Measurement of one config.

    Attributes:
        config (str): The config.
        level (str): Level of the conversion.
        breakdown (Breakdown): Memory that its model keeps.
        losses (tuple[float]): Losses of the training steps.
    """

    config: str
    level: str
    breakdown: Breakdown
    losses: tuple = ()

    @property
    def name(self):
        """str: The config without folder and ending."""
        return Path(self.config.rpartition('::')[2]).stem


def parse_args(argv=None):
    """Read the command line.

    Args:
        argv (list[str], optional): Arguments. Defaults to the process's own.

    Returns:
        argparse.Namespace: Settings.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'configs',
        nargs='+',
        metavar='CONFIG',
        help='config file, or package::path of an installed package',
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        default=[800, 1344],
        metavar=('HEIGHT', 'WIDTH'),
        help='of the images; 800 1344 by default',
    )
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument(
        '--level',
        help="level by name; by default that of the config's ActNNHook, and "
        f'{DEFAULT_LEVEL} without one',
    )
    parser.add_argument(
        '--steps',
        type=int,
        default=0,
        help='training steps after the conversion, the measured one '
        'included; by default that one is not completed',
    )
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    parser.add_argument(
        '--amp', choices=_DTYPES, help='autocast to this dtype'
    )
    parser.add_argument(
        '--top', type=int, default=20, help='rows before "others"'
    )
    parser.add_argument(
        '--summary',
        action='store_true',
        help='one row a config, as with several',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='override settings of the configs',
    )
    parser.add_argument(
        '--out', type=Path, metavar='JSON', help='file for all the figures'
    )
    args = parser.parse_args(argv)
    for name in ('batch_size', 'top', 'shape'):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f'{name} must be 1 or more, got {value}')
    if args.steps < 0:
        parser.error(f'steps must be 0 or more, got {args.steps}')
    if args.level is not None and args.level not in mmactnn.LEVELS:
        parser.error(
            f'--level must be one of {", ".join(mmactnn.LEVELS)}, got '
            f'{args.level!r}'
        )
    return args


def measure(name, args):
    """Convert the model of a config, and measure its memory.

    Args:
        name (str): The config.
        args (argparse.Namespace): From :func:`parse_args`.

    Returns:
        Report: The measurement.

    Raises:
        SystemExit: If there is no such config, its hook cannot convert the
            model, it names compressed layers but the model has none, or the
            model cannot be built or trained here.
    """
    torch.manual_seed(0)
    with _explained(name):
        config = synthetic.load_config(name, args.cfg_options)
    settings = hook_settings(config)
    if args.level is not None:
        settings['level'] = args.level
    images = torch.randn(args.batch_size, 3, *args.shape, device=args.device)
    with _told_in_one_line(name, 'cannot be built'):
        model, compute_loss = synthetic.build_task(config, images)
    with _explained(name):
        report = mmactnn.convert_model(
            model, num_samples=args.batch_size, **settings
        )
        require_named_layers(
            model,
            config.model,
            settings.get('include'),
            settings.get('exclude', ()),
        )
    if mmactnn.get_level(settings.get('level', DEFAULT_LEVEL)).use_gradient:
        mmactnn.get_precision(model).set_samples(range(args.batch_size))
    dtype = _DTYPES.get(args.amp)
    autocast = torch.autocast(
        images.device.type, dtype, enabled=dtype is not None
    )
    locator = Locator(model)
    with _told_in_one_line(name, 'cannot be trained'):
        with autocast, mmactnn.measure_activations(model, locator) as meter:
            loss = compute_loss()
        breakdown = Breakdown.of(meter, model, report)
        losses = _train(model, loss, compute_loss, autocast, args.steps)
    return Report(name, report.level, breakdown, losses)


def _train(model, loss, compute_loss, autocast, steps):
    """Take training steps, the first one with a loss that is there.

    Args:
        model (nn.Module): The model.
        loss (Tensor[()]): Loss of the first step.
        compute_loss (Callable): Computes that of the others.
        autocast (torch.autocast): Context of the forward passes.
        steps (int): How many.

    Returns:
        tuple[float]: The losses.

    Raises:
        FloatingPointError: If a loss or a gradient is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-5, momentum=0.9)
    losses = []
    for step in range(steps):
        if step:
            with autocast:
                loss = compute_loss()
        loss.backward()
        losses.append(loss.item())
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in parameters if p.grad is not None]
        )
        if not (loss.isfinite() and norm.isfinite()):
            raise FloatingPointError(
                f'step {step + 1} must have a finite loss and gradient, got '
                f'the loss {loss.item()} and the norm {norm.item()}'
            )
        optimizer.step()
        optimizer.zero_grad()
    return tuple(losses)


def hook_settings(config):
    """Settings with which the hook of a config converts its model.

    Args:
        config (Config): The config.

    Returns:
        dict: Arguments of :func:`mmactnn.convert_model`; empty without a
        hook.
    """
    for hook in config.get('custom_hooks') or ():
        if hook.get('type') in _HOOK_TYPES:
            return {key: hook[key] for key in _HOOK_SETTINGS if key in hook}
    return {}


def make_table(report, top):
    """Tabulate the memory of the parts of a model.

    Args:
        report (Report): The model.
        top (int): Rows; the rest is summed up.

    Returns:
        Table: Parts, the one that keeps most first.
    """
    table = Table(title=f'{report.name}, level {report.level}')
    for title in ('module', 'type', 'saved by'):
        table.add_column(title, no_wrap=True)
    for title in ('exact MiB', 'kept MiB', 'ratio'):
        table.add_column(title, justify='right')
    table.add_column('kept as', no_wrap=True)
    table.add_column('note', no_wrap=True, max_width=_NOTE_WIDTH)
    entries = report.breakdown.entries
    for entry in entries[:top]:
        table.add_row(
            entry.module or '(model)',
            entry.type,
            entry.source or 'layer',
            *_sizes(entry.exact_bytes, entry.kept_bytes),
            entry.category.value,
            # Code: brackets are no markup.
            Text(entry.note),
        )
    rest = Breakdown(entries[top:])
    if rest.entries:
        sizes = _sizes(rest.exact_bytes, rest.kept_bytes)
        table.add_row(f'{len(rest.entries)} others', '', '', *sizes, '', '')
    table.add_section()
    whole = report.breakdown
    sizes = _sizes(whole.exact_bytes, whole.kept_bytes)
    table.add_row('total', '', '', *sizes, '', '')
    return table


def make_summary(reports):
    """Tabulate several models.

    Args:
        reports (list[Report]): The models.

    Returns:
        Table: A row for each.
    """
    table = Table()
    table.add_column('config', overflow='fold')
    table.add_column('level')
    titles = ('exact MiB', 'kept MiB', 'ratio', 'left MiB')
    shares = ('left / exact', 'left / kept')
    for title in (*titles, *shares, 'losses MiB'):
        table.add_column(title, justify='right')
    table.add_column('most of what is left', overflow='fold')
    for report in reports:
        whole = report.breakdown
        causes = whole.causes(Category.LEFT)[:3]
        table.add_row(
            report.name,
            report.level,
            *_sizes(whole.exact_bytes, whole.kept_bytes),
            _mib(whole.kept_in(Category.LEFT)),
            f'{whole.left_share:.1%}',
            f'{whole.left_share_of_kept:.1%}',
            _mib(whole.kept_in(Category.LOSS)),
            ', '.join(f'{cause} {_mib(size)}' for cause, size in causes),
        )
    return table


def as_dict(report):
    """All figures of a model.

    Args:
        report (Report): The model.

    Returns:
        dict: Figures, serialisable as json.
    """
    whole = report.breakdown
    return dict(
        config=report.config,
        level=report.level,
        exact_bytes=whole.exact_bytes,
        kept_bytes=whole.kept_bytes,
        ratio=whole.ratio,
        kept_as={c.value: whole.kept_in(c) for c in Category},
        left_share=whole.left_share,
        left_share_of_kept=whole.left_share_of_kept,
        losses=report.losses,
        entries=[
            {**dataclasses.asdict(entry), 'category': entry.category.value}
            for entry in whole.entries
        ],
    )


def main(argv=None):
    """Measure everything and print a table.

    Args:
        argv (list[str], optional): Arguments. Defaults to the process's own.
    """
    args = parse_args(argv)
    # Silence models, which log the initialisation of each weight.
    MMLogger.get_instance('memory_report', log_level='WARNING')
    console = Console()
    if not console.is_terminal:
        # A log has no width.
        console = Console(width=_WIDTH)
    reports = [measure(name, args) for name in args.configs]
    if args.summary or len(reports) > 1:
        console.print(make_summary(reports))
    else:
        console.print(make_table(reports[0], args.top))
        console.print(summarize(reports[0]), markup=False)
    if args.out:
        setting = dict(
            batch_size=args.batch_size,
            shape=args.shape,
            precision=args.amp or 'fp32',
            device=args.device,
        )
        figures = [{**as_dict(report), **setting} for report in reports]
        args.out.write_text(json.dumps(figures, indent=1) + '\n')


def main_in_file(arguments, log):
    """Measure and print as :func:`main`, all into a file.

    Args:
        arguments (list[str]): Command line.
        log (Path): The file.
    """
    with log.open('w') as file:
        # Libraries in other languages print, too.
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        main(arguments)


def summarize(report):
    """Summarise the memory of a model in two lines.

    Args:
        report (Report): The model.

    Returns:
        str: Totals by category, and uncompressed memory.
    """
    whole = report.breakdown
    parts = ', '.join(
        f'{category.value} {_mib(whole.kept_in(category))}'
        for category in Category
    )
    return (
        f'kept {_mib(whole.kept_bytes)} of {_mib(whole.exact_bytes)} MiB, '
        f'{whole.ratio:.1f} times less: {parts}\n{whole}'
    )


@contextlib.contextmanager
def _explained(name):
    """Exit with a message on a mistake in a config, as a context."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        print(f'{name}: {error}', file=sys.stderr)
        raise SystemExit(USAGE) from error


@contextlib.contextmanager
def _told_in_one_line(name, what):
    """Exit with one line on an error in the code of a model, as a context."""
    try:
        yield
    except Exception as error:
        code = FAILED
        words = str(error)
        if any(part in words for part in _NEEDS_GPU):
            code, what = NEEDS_GPU, 'runs on a GPU only'
        # The first line tells what happened; later ones are stacks.
        lines = words.strip().splitlines() or ['']
        *_, frame = traceback.extract_tb(error.__traceback__)
        place = f'{Path(frame.filename).name}:{frame.lineno}'
        print(
            f'{name}: {what}: {type(error).__name__}: {lines[0]} ({place})',
            file=sys.stderr,
        )
        raise SystemExit(code) from error


def _sizes(exact, kept):
    """Cells of two sizes and their ratio."""
    ratio = f'{exact / kept:.1f}' if exact and kept else '-'
    return _mib(exact), _mib(kept), ratio


def _mib(nbytes):
    return f'{nbytes / MIB:.2f}'


if __name__ == '__main__':
    main()
