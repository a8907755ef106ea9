"""Runs the plan of a fused block."""

import torch

from ..modules.execution import is_observed, is_ordinary, is_transformed
from .chain import ChainRunner, count_large
from .eligibility import are_functions_intact, has_hooks, is_watched
from .plan import Slot, chain_layers, resolve


class BlockRunner:
    """Plans of one fused block, and the state of their chains.

    Plans are names and functions alone: copies of a module share them. They
    are left out of pickles, and made again when the copy runs.

    Args:
        plans (Sequence[Plan]): One for each kind of input.
    """

    def __init__(self, plans):
        self._plans = tuple(plans)
        self._chains = {}

    def __deepcopy__(self, memo):
        return type(self)(self._plans)

    def __copy__(self):
        return type(self)(self._plans)

    def __reduce__(self):
        return _Unpickled, ()

    @property
    def plans(self):
        """tuple[Plan]: The plans."""
        return self._plans

    def find_plan(self, module, cls, args, kwargs):
        """The plan that a call may run by, and its inputs.

        Args:
            module (nn.Module): The block.
            cls (type): Class that it had before it was fused.
            args (tuple): Arguments of the call.
            kwargs (dict): Likewise.

        Returns:
            tuple[Plan, list] | None: None if the class's own forward pass
            has to run.
        """
        if not torch.is_grad_enabled() or is_transformed() or is_observed():
            return None
        for plan in self._plans:
            trace = plan.trace
            inputs = _bind(trace, args, kwargs)
            if (
                inputs is not None
                and all(_fits(value, trace.takes) for value in inputs)
                and (module.training or _is_frozen(plan, inputs))
                and are_functions_intact()
                and trace.guards.hold(module, cls)
            ):
                return plan, inputs
        return None

    def run(self, module, plan, inputs):
        """Run a plan.

        Args:
            module (nn.Module): The block.
            plan (Plan): See :meth:`find_plan`.
            inputs (Sequence[Tensor[*]]): See there.

        Returns:
            object: What the forward pass returns.
        """
        values = [*inputs, *[None] * (plan.size - len(inputs))]
        for slot in plan.shared:
            leaf = inputs[slot]
            if isinstance(leaf, torch.Tensor) and leaf.grad_fn is None:
                # What frozen stages return is read by the shortcut, too.
                cache = _cache_of(module, plan)
                if cache is not None:
                    with cache.in_block(leaf):
                        return self._run_steps(module, plan, values)
        del inputs
        return self._run_steps(module, plan, values)

    def _run_steps(self, module, plan, values):
        steps, i = plan.steps, 0
        while i < len(steps):
            end = plan.segments.get(i)
            done = None
            if end is not None:
                done = self._run_chain(module, plan, i, end, values)
            if done is None:
                done = i + 1
                step = steps[i]
                values[step.output] = _run_step(module, step, values)
            for step in steps[i:done]:
                for slot in step.frees:
                    values[slot] = None
            i = done
        return _fill(plan.result, values)

    def _run_chain(self, module, plan, start, end, values):
        """Run steps as one chain; the index behind them, or None."""
        first = values[plan.steps[start].args[0].index]
        # Inputs become smaller; the first may be too large.
        if not isinstance(first, torch.Tensor) or count_large([first]):
            return None
        made = chain_layers(module, plan, start, end, plan_to_merge)
        if made is None:
            return None
        layers, slots = made
        inputs = [values[slot] for slot in slots]
        if not all(isinstance(value, torch.Tensor) for value in inputs):
            return None
        # Of what is added, too, the gradient lives as long as the chain's.
        if any(count_large([value]) for value in inputs):
            return None
        key = id(plan), start
        chain = self._chains.get(key)
        if chain is None:
            chain = self._chains[key] = ChainRunner()
        outputs = chain(layers, inputs)
        if outputs is None:
            return None
        values[plan.steps[end - 1].output] = outputs[0]
        return end


class _Unpickled:
    """Stands for a runner in a module from a pickle, until that runs."""

    plans = ()

    def find_plan(self, module, cls, args, kwargs):
        """See :class:`BlockRunner`; plans the block again."""
        from .find import plan_again

        module.__dict__['_fused'] = runner = plan_again(module)
        return runner.find_plan(module, cls, args, kwargs)


def plan_to_merge(part):
    """The plan of a part that may run as part of a larger chain, now.

    Args:
        part (nn.Module): The part.

    Returns:
        Plan, optional: None if somebody would notice, or the part would not
        run by it.
    """
    runner = part.__dict__.get('_fused')
    if runner is None or len(runner.plans) != 1 or has_hooks(part):
        return None
    (plan,) = runner.plans
    cls = type(part).plain_class
    if (
        'forward' in part.__dict__
        or not part.training
        or not plan.sites
        or not plan.is_simple
        or not plan.trace.guards.hold(part, cls)
        or any(
            is_watched(resolve(part, name))
            for site in plan.sites
            for name in site.members[3:]
        )
    ):
        return None
    return plan


def _cache_of(module, plan):
    """Cache of the payloads that the layers of a block share, if any."""
    for site in plan.sites:
        for name in site.members:
            layer = name and resolve(module, name)
            quantizer = getattr(layer, 'quantizer', None)
            if quantizer is not None:
                return quantizer.cache
    return None


def _bind(trace, args, kwargs):
    """Inputs of a call in the order of a trace's, or None."""
    count = len(trace.inputs)
    if not kwargs and len(args) == count:
        return list(args)
    names = [node.target for node in trace.inputs]
    names += trace.defaults
    if len(args) > len(names) or not kwargs.keys() <= set(names):
        return None
    given = dict(zip(names, args))
    if not given.keys().isdisjoint(kwargs):
        return None
    given.update(kwargs)
    for name, value in trace.defaults.items():
        if name in given:
            argument = given.pop(name)
            if argument is not value and (
                type(argument) is not type(value) or argument != value
            ):
                return None
    if len(given) != count:
        return None
    return [given[name] for name in names[:count]]


def _fits(value, takes):
    if takes is torch.Tensor:
        return is_ordinary(value)
    if type(value) is not takes or (takes is tuple and len(value) != 1):
        return False
    return all(map(is_ordinary, value))


def _is_frozen(plan, inputs):
    """Whether a block takes part in training, but is not trained."""
    return (
        not plan.trace.only_training
        and all(site.runs_frozen for site in plan.sites)
        and not any(
            isinstance(x, torch.Tensor) and x.requires_grad for x in inputs
        )
    )


def _run_step(module, step, values):
    if step.kind == 'site':
        layers = [
            name and resolve(module, name) for name in step.target.members
        ]
        inputs = [values[slot.index] for slot in step.args]
        for slot in step.frees:
            values[slot] = None
        return step.target.take(layers, inputs, not module.training)
    args = _fill(step.args, values)
    kwargs = _fill(step.kwargs, values)
    if step.kind == 'call_module':
        return resolve(module, step.target)(*args, **kwargs)
    if step.kind == 'call_function':
        return step.target(*args, **kwargs)
    if step.kind == 'call_method':
        return getattr(args[0], step.target)(*args[1:], **kwargs)
    value = module
    for name in step.target:
        value = getattr(value, name)
    return value


def _fill(arguments, values):
    """Arguments with values in place of slots."""
    kind = type(arguments)
    if kind is Slot:
        return values[arguments.index]
    if isinstance(arguments, dict):
        return {k: _fill(v, values) for k, v in arguments.items()}
    if isinstance(arguments, tuple):
        filled = [_fill(argument, values) for argument in arguments]
        return kind(*filled) if hasattr(kind, '_fields') else tuple(filled)
    if isinstance(arguments, list):
        return [_fill(argument, values) for argument in arguments]
    if kind is slice:
        return slice(
            *_fill((arguments.start, arguments.stop, arguments.step), values)
        )
    return arguments
