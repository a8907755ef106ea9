"""Runs the plan of a fused block."""

import torch

from ..modules.execution import is_ordinary
from .chain import ChainRunner, count_large
from .eligibility import has_hooks, is_watched, may_fuse
from .plan import Slot, chain_layers, members_of, resolve


class BlockRunner:
    """Plans of one fused block, and the state of their chains.

    Plans are names and functions alone: copies of a module share them. They
    are left out of pickles, and made again when the copy runs.

    Args:
        plans (Sequence[Plan]): One for each kind of input.

    Attributes:
        plans (tuple[Plan]): The same.
    """

    def __init__(self, plans):
        self.plans = tuple(plans)
        self._chains = {}
        # Parts that the block had when the guards of a plan held last.
        self.seen = {}

    def __deepcopy__(self, memo):
        return type(self)(self.plans)

    def __copy__(self):
        return type(self)(self.plans)

    def __reduce__(self):
        return _Unpickled, ()

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
        if not may_fuse():
            return None
        for plan in self.plans:
            trace = plan.trace
            inputs = _bind(plan, args, kwargs)
            if (
                inputs is not None
                and _fit(inputs, trace.takes)
                and (module.training or _is_frozen(plan, inputs))
                and trace.guards.hold(module, cls, self.seen)
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
            # Chains are of layers that are trained.
            if end is not None and module.training:
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
        or not plan.trace.guards.hold(part, cls, runner.seen)
        or _are_watched(part, plan.passed)
    ):
        return None
    return plan


def _are_watched(part, names):
    for name in names:
        if is_watched(resolve(part, name)):
            return True
    return False


def _cache_of(module, plan):
    """Cache of the payloads that the layers of a block share, if any."""
    for site in plan.sites:
        for layer in members_of(module, site):
            quantizer = getattr(layer, 'quantizer', None)
            if quantizer is not None:
                return quantizer.cache
    return None


def _bind(plan, args, kwargs):
    """Inputs of a call in the order of a plan's, or None."""
    count, trace = len(plan.names), plan.trace
    if not kwargs and len(args) == count:
        return list(args)
    names = [*plan.names, *trace.defaults]
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


def _fit(inputs, takes):
    if takes is torch.Tensor:
        return all(map(is_ordinary, inputs))
    return all(
        type(value) is takes
        and (takes is not tuple or len(value) == 1)
        and all(map(is_ordinary, value))
        for value in inputs
    )


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
        layers = members_of(module, step.target)
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
