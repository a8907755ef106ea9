"""Chains over several feature maps: parallel convolutions, and heads."""

import weakref
from typing import NamedTuple

from ..fusion.block import plain_class_of
from ..fusion.chain import ChainLayer, ChainRunner, count_oversized
from ..fusion.eligibility import has_hooks, is_convolution, is_instrumented
from ..fusion.plan import append_layers, collect_layers, resolve
from ..fusion.runner import plan_to_merge
from ..fusion.trace import UntraceableError, trace_block
from ..ops import source_of_input


def run_convs(convs, inputs):
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


class _SingleCall(NamedTuple):
    """Forward pass that consists of a single call.

    Attributes:
        path (tuple[str], optional): Names that lead to the part that is
            called; None if the forward pass is no single call.
        guards (Guards, optional): Guards of the trace.
        last_parts (dict): See :meth:`Guards.hold`.
    """

    path: tuple | None
    guards: object
    last_parts: dict


def _find_single_call(module):
    try:
        (trace,) = trace_block(module, plain_class_of(module))
    except (UntraceableError, ValueError):
        return _SingleCall(None, None, {})
    calls = trace.calls
    path = None
    if (
        len(calls) == 1
        and calls[0].op == 'call_module'
        and trace.output.args == calls
    ):
        path = tuple(calls[0].target.split('.'))
    return _SingleCall(path, trace.guards, {})


class ParallelConvs:
    """Runs convolutions, each on an input of its own, as one chain.

    Convolutions of the largest inputs run by themselves. Copies and pickles
    start without a plan.
    """

    def __init__(self):
        self._run_chain = ChainRunner()
        self._single_calls = weakref.WeakKeyDictionary()

    def __reduce__(self):
        return type(self), ()

    def __call__(self, convs, inputs):
        """See :func:`run_convs`; the largest input is first."""
        # A slice of an nn.ModuleList would be a new module.
        convs, oversized = list(convs), count_oversized(inputs)
        rest = inputs[oversized:]
        del inputs[oversized:]
        outputs = run_convs(convs[:oversized], inputs)
        if rest:
            outputs += self._run_rest(convs[oversized:], rest)
        return outputs

    def _run_rest(self, modules, inputs):
        convs = [self._find_conv(module) for module in modules]
        outputs = None
        if None not in convs:
            layers = [
                ChainLayer(conv, None, None, source_of_input(i))
                for i, conv in enumerate(convs)
            ]
            outputs = self._run_chain(layers, inputs)
        return list(outputs or run_convs(modules, inputs))

    def _find_conv(self, module):
        """Convolution that is all of a module's forward pass, or None."""
        if is_convolution(module):
            return module
        if is_instrumented(module):
            return None
        call = self._single_calls.get(module)
        if call is None:
            call = self._single_calls[module] = _find_single_call(module)
        if call.path is None or not call.guards.hold(
            module, plain_class_of(module), call.last_parts
        ):
            return None
        conv = resolve(module, call.path)
        return conv if is_convolution(conv) else None


class HeadRunner:
    """Runs the layers of a head with two outputs over feature levels.

    All levels run as one chain, without the largest ones if their maps or
    outputs are too large.
    """

    def __init__(self):
        # Runners by number of levels.
        self._chains = {}

    def __reduce__(self):
        return type(self), ()

    def __call__(self, layers, feats, run_level):
        """Run the layers.

        Args:
            layers (Sequence[ChainLayer], optional): The layers, with two
                outputs; None if they do not run as a chain.
            feats (Sequence[Tensor[N, C, H, W]]): Feature maps, the largest
                first.
            run_level (Callable): Runs the layers for one map, and returns
                both outputs.

        Returns:
            tuple[list[Tensor[N, O, H, W]], list[Tensor[N, P, H, W]]]: The
            outputs, as heads of MMDetection return them.
        """
        done = len(feats) if layers is None else count_oversized(feats)
        outputs = [run_level(x) for x in feats[:done]]
        while done < len(feats):
            rest = list(feats[done:])
            run_chain = self._chains.setdefault(
                len(rest), ChainRunner(for_each=True)
            )
            flat = run_chain(layers, rest)
            if run_chain.too_large:
                outputs.append(run_level(rest[0]))
                done += 1
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
        list[ChainLayer], optional: None if a chain cannot run the module, or
        if it has hooks or patches.
    """
    if next(module.children(), None) is None:
        return [ChainLayer(module, None, None, source_of_input(0))]
    plan = plan_to_merge(module)
    if plan is None or has_hooks(module):
        return None
    found = collect_layers(module, plan, 0, len(plan.steps), plan_to_merge)
    if found is None:
        return None
    layers, input_slots = found
    return layers if input_slots == [0] else None


def layers_of_sequence(modules):
    """Layers of modules that run one after the other, as in a tower.

    Args:
        modules (Sequence[nn.Module]): The modules.

    Returns:
        list[ChainLayer], optional: None if a chain cannot run one of them,
        see :func:`layers_of`.
    """
    layers = []
    for module in modules:
        others = layers_of(module)
        if others is None:
            return None
        source = len(layers) - 1 if layers else source_of_input(0)
        append_layers(layers, others, source)
    return layers
