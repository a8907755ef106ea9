"""Chains over several feature maps: convolutions and head levels."""

import weakref
from typing import NamedTuple

from ..fusion.chain import ChainRunner, Layers, count_large
from ..fusion.eligibility import has_hooks, is_convolution, is_watched
from ..fusion.plan import append_layers, chain_layers, resolve
from ..fusion.runner import plan_to_merge
from ..fusion.trace import Untraceable, trace_block
from ..ops import source_of_input


def run_each(convs, inputs):
    """Run convolutions, each on an input of its own.

    Args:
        convs (Sequence[nn.Module]): The convolutions.
        inputs (list[Tensor[N, C, H, W]]): Their inputs. The list is emptied,
            so that each input is freed once its convolution has read it.

    Returns:
        list[Tensor[N, O, H', W']]: Their outputs.
    """
    inputs.reverse()
    return [conv(inputs.pop()) for conv in convs]


class _LoneCall(NamedTuple):
    """The only call of a module's forward pass.

    Attributes:
        path (tuple[str], optional): Names that lead to the part that is
            called; None if the module does more.
        guards (Guards, optional): What its trace rests on.
        seen (dict): See :meth:`Guards.hold`.
    """

    path: tuple | None
    guards: object
    seen: dict


def _find_lone_call(module):
    try:
        (trace,) = trace_block(module, type(module))
    except (Untraceable, ValueError):
        return _LoneCall(None, None, {})
    calls = trace.calls
    path = None
    if (
        len(calls) == 1
        and calls[0].op == 'call_module'
        and trace.output.args == calls
    ):
        path = tuple(calls[0].target.split('.'))
    return _LoneCall(path, trace.guards, {})


class ParallelConvs:
    """Runs convolutions, each on an input of its own, as one chain.

    Convolutions of the largest inputs run alone. Copies and pickles start
    afresh.
    """

    def __init__(self):
        self._run_chain = ChainRunner()
        self._lone = weakref.WeakKeyDictionary()

    def __reduce__(self):
        return type(self), ()

    def __call__(self, convs, inputs):
        """See :func:`run_each`; the largest input is first."""
        # A slice of an nn.ModuleList would be a new module.
        convs, alone = list(convs), count_large(inputs)
        rest = inputs[alone:]
        del inputs[alone:]
        outputs = run_each(convs[:alone], inputs)
        if rest:
            outputs += self._run_rest(convs[alone:], rest)
        return outputs

    def _run_rest(self, convs, inputs):
        lone = [self._lone_conv(conv) for conv in convs]
        if None in lone:
            return run_each(convs, inputs)
        layers = [
            Layers(conv, None, None, source_of_input(i))
            for i, conv in enumerate(lone)
        ]
        return list(self._run_chain(layers, inputs) or run_each(convs, inputs))

    def _lone_conv(self, module):
        """The convolution, if a module consists of nothing else, or None."""
        if is_convolution(module):
            return module
        if is_watched(module):
            return None
        lone = self._lone.get(module)
        if lone is None:
            lone = self._lone[module] = _find_lone_call(module)
        if lone.path is None or not lone.guards.hold(
            module, type(module), lone.seen
        ):
            return None
        conv = resolve(module, lone.path)
        return conv if is_convolution(conv) else None


class HeadLevels:
    """Runs the layers of a head with two outputs over feature levels.

    All levels run as one chain, except for the largest ones if their maps or
    outputs are too large.
    """

    def __init__(self):
        # Keys are numbers of levels.
        self._chains = {}

    def __reduce__(self):
        return type(self), ()

    def __call__(self, layers, feats, run_level):
        """Run the layers.

        Args:
            layers (Sequence[Layers], optional): The layers, with two outputs;
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
                outputs.append(run_level(rest[0]))
                alone += 1
                continue
            if flat is None:
                outputs += [run_level(x) for x in rest]
            else:
                outputs += zip(flat[::2], flat[1::2])
            break
        return tuple(map(list, zip(*outputs)))


def layers_of(module):
    """Layers of a module that may run as part of a chain.

    Args:
        module (nn.Module): A convolution, or a fused block of one input.

    Returns:
        list[Layers], optional: None if it does more, or if hooks or patches
        could tell the difference.
    """
    if next(module.children(), None) is None:
        return [Layers(module, None, None, source_of_input(0))]
    plan = plan_to_merge(module)
    if plan is None or has_hooks(module):
        return None
    made = chain_layers(module, plan, 0, len(plan.steps), plan_to_merge)
    return None if made is None or made[1] != [0] else made[0]


def row_of_layers(modules):
    """Layers of modules that follow one another.

    Args:
        modules (Sequence[nn.Module]): The modules.

    Returns:
        list[Layers], optional: None if one of them does more.
    """
    layers = []
    for module in modules:
        own = layers_of(module)
        if own is None:
            return None
        append_layers(
            layers, own, len(layers) - 1 if layers else source_of_input(0)
        )
    return layers
