"""Runner of the plans of a fused block."""

import torch

from ..functional import call_in_scope
from ..modules.execution import is_ordinary
from .chain import ChainRunner, fit_in_chain
from .eligibility import has_hooks, is_instrumented, may_fuse
from .plan import collect_layers, members_of, resolve
from .values import fill


class BlockRunner:
    """Plans of one fused block, and the state of their chains.

    Plans consist of names and functions, so that copies of a module share
    them. They are left out of pickles, and made again when the copy runs.

    Args:
        plans (Sequence[Plan]): One for each kind of input.

    Attributes:
        plans (tuple[Plan]): The same.
    """

    def __init__(self, plans):
        self.plans = tuple(plans)
        self._chains = {}
        # Parts of the block when the guards of a plan held last.
        self.last_parts = {}

    def __deepcopy__(self, memo):
        return type(self)(self.plans)

    def __copy__(self):
        return type(self)(self.plans)

    def __reduce__(self):
        return _Unpickled, ()

    def find_plan(self, module, cls, args, kwargs):
        """Find the plan for a call.

        Args:
            module (nn.Module): The block.
            cls (type): Class of the block before it was fused.
            args (tuple): Arguments of the call.
            kwargs (dict): Keyword arguments of the call.

        Returns:
            tuple[Plan, list] | None: The plan and its inputs; None if the
            class's own forward pass has to run.
        """
        if not may_fuse():
            return None
        for plan in self.plans:
            trace = plan.trace
            inputs = bind(plan, args, kwargs)
            if (
                inputs is not None
                and _are_supported(inputs, trace.input_type)
                and (module.training or _is_frozen(plan, inputs))
                and trace.guards.hold(module, cls, self.last_parts)
            ):
                return plan, inputs
        return None

    def run(self, module, plan, inputs):
        """Run a plan.

        Args:
            module (nn.Module): The block.
            plan (Plan): See :meth:`find_plan`.
            inputs (Sequence[Tensor[*]]): The inputs, see there.

        Returns:
            object: The result of the forward pass.
        """
        values = [*inputs, *[None] * (plan.num_slots - len(inputs))]
        for slot in plan.shared_inputs:
            leaf = inputs[slot]
            if isinstance(leaf, torch.Tensor) and leaf.grad_fn is None:
                # The shortcut, too, reads the output of a frozen stage.
                cache = _cache_of(module, plan)
                if cache is not None:
                    with cache.in_block(leaf):
                        return self._run_steps(module, plan, values)
        del inputs
        return self._run_steps(module, plan, values)

    def _run_steps(self, module, plan, values):
        steps, i = plan.steps, 0
        while i < len(steps):
            segment_end = plan.segments.get(i)
            end = None
            # A chain runs layers that are trained.
            if segment_end is not None and module.training:
                end = self._run_chain(module, plan, i, segment_end, values)
            if end is None:
                end = i + 1
                step = steps[i]
                values[step.output] = run_step(module, step, values)
            for step in steps[i:end]:
                for slot in step.frees:
                    values[slot] = None
            i = end
        return fill(plan.result, values)

    def _run_chain(self, module, plan, start, end, values):
        """Run steps as one chain, and return ``end``; None if it cannot."""
        first = values[plan.steps[start].args[0].slot]
        # An early exit: mostly, feature maps shrink along a block, so that the
        # first input is the largest.
        if not fit_in_chain([first]):
            return None
        found = collect_layers(module, plan, start, end, plan_to_merge)
        if found is None:
            return None
        layers, slots = found
        inputs = [values[slot] for slot in slots]
        # Gradients of residuals live as long as the chain's, too.
        if not fit_in_chain(inputs):
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
    """Placeholder of the runner in a module from a pickle until it runs."""

    plans = ()

    def find_plan(self, module, cls, args, kwargs):
        """See :class:`BlockRunner`; plans the block again."""
        from .find import plan_again

        module.__dict__['_fused'] = runner = plan_again(module)
        return runner.find_plan(module, cls, args, kwargs)


def plan_to_merge(part):
    """The plan of a part that may now run as part of a larger chain.

    Args:
        part (nn.Module): The part.

    Returns:
        Plan, optional: None if hooks or patches would miss the call of the
        part, or the part would not run by the plan.
    """
    runner = part.__dict__.get('_fused')
    if runner is None or has_hooks(part):
        return None
    plans = [plan for plan in runner.plans if not plan.trace.optional]
    if len(plans) != 1:
        return None
    (plan,) = plans
    cls = type(part).plain_class
    if (
        'forward' in part.__dict__
        or not part.training
        or not plan.sites
        or not plan.is_mergeable
        or not plan.trace.guards.hold(part, cls, runner.last_parts)
        or _are_instrumented(part, plan.identities)
    ):
        return None
    return plan


def _are_instrumented(part, names):
    for name in names:
        if is_instrumented(resolve(part, name)):
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


def bind(plan, args, kwargs):
    """Bind the arguments of a call to the inputs of a plan.

    Args:
        plan (object): A plan with its ``trace`` and ``input_names``.
        args (tuple): Arguments of the call.
        kwargs (dict): Keyword arguments of the call.

    Returns:
        list[object], optional: The inputs; None if the plan is for others.
    """
    trace, needed = plan.trace, plan.input_names
    names, count = trace.arguments, len(needed)
    if not kwargs and len(args) == count and names[:count] == needed:
        return list(args)
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
    return [given[name] for name in needed]


def _are_supported(inputs, input_type):
    if input_type is torch.Tensor:
        return all(map(is_ordinary, inputs))
    return all(
        type(value) is input_type
        and (input_type is not tuple or len(value) == 1)
        and all(map(is_ordinary, value))
        for value in inputs
    )


def _is_frozen(plan, inputs):
    """Whether a plan can run in a frozen block of a model in training."""
    return (
        not plan.trace.training_only
        and all(site.runs_frozen for site in plan.sites)
        and not any(
            isinstance(x, torch.Tensor) and x.requires_grad for x in inputs
        )
    )


def run_step(module, step, values):
    """Run a step of a plan.

    Args:
        module (nn.Module): The block.
        step (Step): The step.
        values (list[object]): Values by slot. A site frees its inputs.

    Returns:
        object: Its value.
    """
    if step.kind == 'site':
        layers = members_of(module, step.target)
        inputs = [values[ref.slot] for ref in step.args]
        for slot in step.frees:
            values[slot] = None
        return step.target.execute(layers, inputs, not module.training)
    args = fill(step.args, values)
    kwargs = fill(step.kwargs, values)
    if step.kind == 'call_module':
        return resolve(module, step.target)(*args, **kwargs)
    if step.kind == 'call_function':
        return call_in_scope(module, step.target, args, kwargs)
    if step.kind == 'call_method':
        method = getattr(args[0], step.target)
        return call_in_scope(module, method, args[1:], kwargs)
    value = module
    for name in step.target:
        value = getattr(value, name)
    return value
