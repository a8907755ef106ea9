"""Entry points: ``mmactnn.compile`` and options for ``torch.compile``."""

import torch
from torch import nn

from ..config import DEFAULT_LEVEL, get_level
from ..layers.base import QuantizedLayer
from ..random import default_generator

_BACKENDS = ('inductor', 'aot_eager')
_REPORT = '_mmactnn_report'


def compile(model, level=DEFAULT_LEVEL.name, **kwargs):
    """Compile a model or function so that it keeps few-bit codes.

    Outputs, and so the loss, are those of ``torch.compile``. Of what the
    backward pass reads, values in which it is linear are kept as codes,
    predicates as bits, and all else as it is; gradients are unbiased but for
    the exceptions that the documentation numbers. No rule names a model or a
    layer: it holds for any architecture that compiles. The model itself stays
    as it is.

    Args:
        model (nn.Module | Callable): Without compressed layers.
        level (str | dict | Level, optional): See :func:`mmactnn.get_level`.
            At an exact level the result is that of ``torch.compile``.
            Defaults to ``'L3'``.
        **kwargs: ``backend``, ``options`` and ``mode`` as in
            :func:`compile_options`, and all else of ``torch.compile``, such
            as ``dynamic`` and ``fullgraph``.

    Returns:
        Callable: What ``torch.compile`` returns. :func:`compile_report` tells
        what its graphs keep.

    Raises:
        TypeError: If ``model`` is not callable.
        ValueError: If it has compressed layers, or a value is not valid.
        RuntimeError: If this version of torch lacks what is needed.

    Examples:
        >>> model = mmactnn.compile(nn.Sequential(nn.Linear(8, 8)), 'L3')
    """
    if not callable(model):
        raise TypeError(
            f'model must be a module or a function, got {type(model).__name__}'
        )
    names = ('backend', 'options', 'mode')
    chosen = {name: kwargs.pop(name) for name in names if name in kwargs}
    if isinstance(model, nn.Module):
        refuse_converted(model)
        for device in {p.device for p in model.parameters()}:
            default_generator.prepare(device)
    settings = compile_options(level, **chosen)
    compiled = torch.compile(model, **settings, **kwargs)
    report = _report_in(settings)
    if report is not None:
        # Not by setattr(), which a compiled module passes to the model.
        object.__setattr__(compiled, _REPORT, report)
    return compiled


def compile_options(
    level=DEFAULT_LEVEL.name, backend='inductor', options=None, mode=None
):
    """Arguments with which ``torch.compile`` keeps few-bit codes.

    Args:
        level (str | dict | Level, optional): See :func:`compile`. Defaults
            to ``'L3'``.
        backend (str, optional): ``'inductor'`` or ``'aot_eager'``, which has
            Inductor's decompositions, as ``'aot_eager_decomp_partition'``.
            Defaults to ``'inductor'``.
        options (dict, optional): Further options of Inductor, such as
            ``{'triton.cudagraphs': True}``. Defaults to none.
        mode (str, optional): Mode of ``torch.compile``, which torch refuses
            beside options; it is turned into these. Defaults to none.

    Returns:
        dict: ``backend`` and, for Inductor, ``options``.

    Raises:
        ValueError: If the backend has no partitioner, the level asks for
            more than a partitioner can do, or options do not fit.
        RuntimeError: If this version of torch lacks what is needed.
    """
    if backend not in _BACKENDS:
        raise ValueError(
            f'backend must be one of {", ".join(map(repr, _BACKENDS))}, got '
            f'{backend!r}: no other one splits graphs by a function of its '
            'caller. For others convert the model: mmactnn.convert_model'
        )
    level = get_level(level)
    _check_level(level)
    if backend == 'aot_eager':
        if options or mode:
            raise ValueError(
                "options and mode are Inductor's, and backend='aot_eager' "
                f'has none: got options={options!r}, mode={mode!r}'
            )
        if level.exact:
            return dict(backend='aot_eager_decomp_partition')
    options = dict(options or {})
    if mode is not None:
        options = {**torch._inductor.list_mode_options(mode), **options}
    if level.exact:
        plain = dict(backend=backend)
        return {**plain, 'options': options} if options else plain
    from . import backends

    if backend == 'aot_eager':
        return dict(backend=backends.AotEager(level.compression))
    name = 'custom_partitioner_fn'
    if name in options:
        raise ValueError(
            f'options hold {name}, whose place the partitioner of mmactnn '
            'takes: remove it, or compile with torch.compile'
        )
    options[name] = backends.InductorPartitioner(level.compression)
    return dict(backend=backend, options=options)


def compile_report(compiled):
    """Report on what the graphs of a compiled model keep.

    Args:
        compiled (Callable | dict): From :func:`compile`, or the result of
            :func:`compile_options` with which something was compiled.

    Returns:
        CompileReport: Complete once all graphs are compiled.

    Raises:
        ValueError: If there is none, as at an exact level.
    """
    if isinstance(compiled, dict):
        report = _report_in(compiled)
    else:
        report = getattr(compiled, '__dict__', {}).get(_REPORT)
    if report is None:
        raise ValueError(
            'there is a report on models from mmactnn.compile at a level '
            f'that keeps codes, got {type(compiled).__name__}'
        )
    return report


def _report_in(settings):
    options = settings.get('options', {})
    holder = options.get('custom_partitioner_fn', settings['backend'])
    return getattr(holder, 'report', None)


def _check_level(level):
    reason = None
    if level.swap or level.expandable:
        reason = 'swaps to the host or sets the allocator'
    elif level.recompute:
        reason = 'runs blocks again'
    elif level.rules:
        reason = 'has rules by name of layer'
    if reason is not None:
        raise ValueError(
            f'level {level.name} {reason}, which compiled graphs do not: '
            "use level='L3' or 'L2', or mmactnn.convert_model without a "
            'compiler'
        )


def refuse_converted(model):
    """Raise if a model has compressed layers.

    Args:
        model (nn.Module): The model.

    Raises:
        ValueError: If it has.
    """
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and not module.quantizer.exact:
            raise ValueError(
                f'the model has compressed layers (first: {name!r}, '
                f'{type(module).__name__}), which a compiled graph has to '
                'go around: compile the model as it was, after '
                'mmactnn.revert_model'
            )
