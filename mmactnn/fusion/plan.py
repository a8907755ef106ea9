"""Execution plan of a fused block: the steps in place of its calls."""

from typing import NamedTuple

from torch import nn
from torch.nn.modules import pooling

from ..ops import source_of_input
from ..registry import default_registry
from .chain import ChainLayer
from .eligibility import base_layer_class
from .sites import ConvNormAct, Site
from .values import ValueRef, with_refs

# Layers of shortcuts that change the resolution.
_POOLS = (pooling._AvgPoolNd, pooling._MaxPoolNd, nn.Identity)


def resolve(module, path):
    """A part of a module.

    Args:
        module (nn.Module): The module.
        path (tuple[str]): Names that lead to the part.

    Returns:
        nn.Module, optional: None if the module has no such part.
    """
    for name in path:
        module = module._modules.get(name)
        if module is None:
            return None
    return module


class Step(NamedTuple):
    """One step of a plan.

    Attributes:
        kind (str): ``'site'``, or the opcode of the ``fx.Node``.
        target (object): The site, or the target of the call: names that lead
            to a module, a function, or the name of a method.
        args (tuple): Arguments, with a :class:`ValueRef` for each value.
        kwargs (dict): Keyword arguments, likewise.
        output (int): Slot of the result.
        frees (tuple[int]): Slots that no later step reads.
    """

    kind: str
    target: object
    args: tuple
    kwargs: dict
    output: int
    frees: tuple


class Plan(NamedTuple):
    """Execution plan of a fused block, valid while its trace's guards hold.

    Attributes:
        trace (Trace): The trace.
        steps (tuple[Step]): The steps.
        result (object): Return value, with a :class:`ValueRef` for each value.
        num_slots (int): Number of slots. Those of the inputs come first.
        segments (dict[int, int]): Maps the index of a step to the end of the
            longest sequence of steps from it that may run as one chain.
        shared_inputs (tuple[int]): Slots of the inputs that several steps
            read.
        input_names (tuple[str]): Names of the inputs.
        sites (tuple[Site]): All sites.
        identities (tuple[tuple[str]]): Names that lead to the ``nn.Identity``
            members of the sites, which a chain skips.
        is_mergeable (bool): Whether the plan may run as part of a larger
            chain: all steps are calls of parts, or sites that a chain can
            run.
    """

    trace: object
    steps: tuple
    result: object
    num_slots: int
    segments: dict
    shared_inputs: tuple
    input_names: tuple
    sites: tuple
    identities: tuple
    is_mergeable: bool


def members_of(module, site):
    """The layers that take part in a site.

    Args:
        module (nn.Module): The block.
        site (Site): The site, as part of a plan.

    Returns:
        list[nn.Module | None]: In the order of its members.
    """
    layers, modules = [], module._modules
    for name in site.members:
        if name is None:
            layers.append(None)
        elif len(name) == 1:
            layers.append(modules.get(name[0]))
        else:
            layers.append(resolve(module, name))
    return layers


def is_chainable(step):
    """Whether a step is a site that a chain can run.

    Args:
        step (Step): The step.
    """
    return (
        step.kind == 'site'
        and isinstance(step.target, ConvNormAct)
        and step.target.is_chainable
    )


def make_plan(module, trace, sites, plans):
    """Make the execution plan of a block.

    Args:
        module (nn.Module): The block.
        trace (Trace): Its trace.
        sites (Sequence[Site]): See :func:`choose_sites`.
        plans (dict[nn.Module, Plan]): Plans of its parts; parts without a
            plan are missing.

    Returns:
        Plan, optional: None if there is neither a site nor a segment.
    """
    order = _schedule(module, trace, sites, plans)
    slots = {node: i for i, node in enumerate(trace.inputs)}
    steps = []
    for item in order:
        slots[_output_node(item)] = len(slots)
        steps.append(_make_step(item, slots))
    (result,) = with_refs(trace.output.args, slots)
    steps = _free_after_last_use(steps, result)
    segments = _find_segments(module, steps, result, plans)
    if not sites and not segments:
        return None
    reads = [_slots_in((step.args, step.kwargs)) for step in steps]
    shared_inputs = tuple(
        i
        for i in range(len(trace.inputs))
        if sum(i in read for read in reads) > 1
    )
    sites = tuple(step.target for step in steps if step.kind == 'site')
    return Plan(
        trace,
        tuple(steps),
        result,
        len(slots),
        segments,
        shared_inputs,
        tuple(node.target for node in trace.inputs),
        sites,
        tuple(name for site in sites for name in site.members[3:]),
        bool(steps)
        and all(
            step.kind == 'call_module' or is_chainable(step) for step in steps
        ),
    )


def choose_sites(block, registry=default_registry):
    """Sites of a block that do not overlap, those of later patterns first.

    Args:
        block (Block): The block.
        registry (Registry, optional): Registry of the patterns. Defaults to
            that of the package.

    Returns:
        list[Site]: The sites.

    Raises:
        TypeError: If a pattern yields an object that is no site.
        ValueError: If a site has calls or inputs that are not in the trace,
            or inner values that are read outside of it.
    """
    taken, chosen = set(), []
    for name, entry in reversed(registry.patterns.items()):
        for site in entry.match(block):
            if not isinstance(site, Site):
                raise TypeError(
                    f'a pattern must yield sites, got {site!r} from {name!r}'
                )
            _check_site(site, name, block.trace)
            site.pattern = name
            if taken.isdisjoint(site.nodes):
                taken.update(site.nodes)
                chosen.append(site)
    return chosen


def _check_site(site, pattern, trace):
    calls, nodes = set(trace.calls), set(site.nodes)
    reason = None
    if not nodes or not calls.issuperset(nodes):
        reason = 'has other calls than those of the trace'
    elif any(not nodes.issuperset(node.users) for node in site.nodes[:-1]):
        reason = 'makes values within it that are read outside'
    elif not calls.union(trace.inputs).issuperset(site.inputs):
        reason = 'reads a value that is not in the trace'
    elif not nodes.isdisjoint(site.inputs):
        reason = 'reads a value of its own'
    if reason is not None:
        raise ValueError(f'a site of the pattern {pattern!r} {reason}')


def _schedule(module, trace, sites, plans):
    """Calls and sites in an order in which they can run.

    A shortcut comes first, though most forward passes have it last: the
    backward pass then reaches it after the gradients of the other branch are
    freed.
    """
    site_of = {site.nodes[-1]: site for site in sites}
    covered = {node for site in sites for node in site.nodes}
    items = [
        site_of.get(node, node)
        for node in trace.calls
        if node in site_of or node not in covered
    ]
    shortcuts = {site.inputs[1] for site in sites if site.adds}
    ready, order = set(trace.inputs), []
    early = [
        item
        for item in items
        if _output_node(item) in shortcuts and _is_pure(item, module, plans)
    ]
    late = [item for item in items if item not in early]
    while early or late:
        movable = [
            item for item in early if ready.issuperset(_input_nodes(item))
        ]
        item = movable[0] if movable else (late or early)[0]
        (early if item in early else late).remove(item)
        order.append(item)
        ready.add(_output_node(item))
    return order


def _output_node(item):
    return item.nodes[-1] if isinstance(item, Site) else item


def _input_nodes(item):
    return item.inputs if isinstance(item, Site) else item.all_input_nodes


def _is_pure(item, module, plans):
    """Whether a call may be moved: it draws no random numbers."""
    if isinstance(item, Site):
        return not item.draws
    if item.op != 'call_module':
        return False
    part = module.get_submodule(item.target)
    return part in plans and _is_deterministic(part, plans)


def _is_deterministic(part, plans):
    """Whether a part is known to draw no random numbers of torch."""
    plan = plans.get(part)
    if plan is None:
        return (
            isinstance(part, _POOLS)
            or base_layer_class(type(part)) is not None
        )
    return all(
        (step.kind == 'site' and not step.target.draws)
        or (
            step.kind == 'call_module'
            and _is_deterministic(resolve(part, step.target), plans)
        )
        for step in plan.steps
    )


def _make_step(item, slots):
    if isinstance(item, Site):
        args = tuple(ValueRef(slots[node]) for node in item.inputs)
        item_slot = slots[item.nodes[-1]]
        return Step('site', _detach_from_graph(item), args, {}, item_slot, ())
    target = item.target
    if item.op in ('call_module', 'get_attr'):
        target = tuple(target.split('.'))
    args, kwargs = with_refs((item.args, item.kwargs), slots)
    return Step(item.op, target, args, kwargs, slots[item], ())


def _detach_from_graph(site):
    """Drop the nodes of a site, which would keep the whole graph alive."""
    site.nodes = site.inputs = ()
    site.members = tuple(
        None if name is None else tuple(name.split('.') if name else ())
        for name in site.members
    )
    return site


def make_steps(calls, slots, result):
    """Make steps of calls as they are written.

    Args:
        calls (Sequence[fx.Node]): The calls, in their order.
        slots (dict[fx.Node, int]): Slots of their values and inputs.
        result (fx.Node): Value that is read after them.

    Returns:
        tuple[Step]: The steps.
    """
    steps = [_make_step(call, slots) for call in calls]
    return tuple(_free_after_last_use(steps, ValueRef(slots[result])))


def _slots_in(arguments):
    if isinstance(arguments, ValueRef):
        return {arguments.slot}
    if isinstance(arguments, (tuple, list)):
        return set().union(*map(_slots_in, arguments))
    if isinstance(arguments, dict):
        return set().union(*map(_slots_in, arguments.values()))
    if isinstance(arguments, slice):
        return _slots_in((arguments.start, arguments.stop, arguments.step))
    return set()


def _free_after_last_use(steps, result):
    kept, freed = _slots_in(result), []
    for step in reversed(steps):
        read = _slots_in(step.args) | _slots_in(step.kwargs) | {step.output}
        freed.append(step._replace(frees=tuple(sorted(read - kept))))
        kept |= read
    return freed[::-1]


def _find_segments(module, steps, result, plans):
    """See :attr:`Plan.segments`."""

    def can_chain(step):
        if is_chainable(step):
            return True
        if step.kind != 'call_module' or step.kwargs or len(step.args) != 1:
            return False
        plan = plans.get(resolve(module, step.target))
        return plan is not None and bool(plan.sites) and plan.is_mergeable

    returned = _slots_in(result)
    segments = {}
    for start in range(len(steps)):
        end = start
        while end < len(steps) and can_chain(steps[end]):
            end += 1
        while end > start:
            inner = {step.output for step in steps[start : end - 1]}
            outside = returned.union(
                *(_slots_in(s.args) | _slots_in(s.kwargs) for s in steps[end:])
            )
            if inner.isdisjoint(outside):
                break
            end -= 1
        # A single site among other steps is mostly that of a stem, whose
        # tensors are large.
        if end - start > 1 or (end > start and len(steps) == 1):
            if steps[end - 1].kind != 'site' and end - start == 1:
                continue
            segments[start] = end
    return segments


def collect_layers(module, plan, start, end, plan_of):
    """Collect the layers of consecutive steps.

    Args:
        module (nn.Module): The block.
        plan (Plan): Its plan.
        start (int): Index of the first step.
        end (int): Index behind the last step.
        plan_of (Callable): Maps a part to its plan; to None if the part would
            not run by one now.

    Returns:
        tuple[list[ChainLayer], list[int]] | None: The layers, and the slots of
        their inputs; None if a step calls a part without such a plan.
    """
    layers, sources = [], _Sources()
    steps = plan.steps[start:end]
    if not _append_steps(layers, module, steps, sources, plan_of):
        return None
    return layers, sources.inputs


class _Sources(dict):
    """Sources of values by slot; slots that no step fills are inputs."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def __missing__(self, slot):
        source = self[slot] = source_of_input(len(self.inputs))
        self.inputs.append(slot)
        return source


def _append_steps(layers, module, steps, sources, plan_of):
    for step in steps:
        read = [sources[ref.slot] for ref in step.args]
        if step.kind == 'site':
            conv, norm, act, *_ = members_of(module, step.target)
            layers.append(ChainLayer(conv, norm, act, *read))
        else:
            part = resolve(module, step.target)
            plan = plan_of(part)
            # Its only input has slot 0.
            if plan is None or len(plan.input_names) != 1:
                return False
            inner = dict(enumerate(read))
            if not _append_steps(layers, part, plan.steps, inner, plan_of):
                return False
        sources[step.output] = len(layers) - 1
    return True


def append_layers(layers, others, source):
    """Append layers of one input to layers.

    Args:
        layers (list[ChainLayer]): The layers, extended in place.
        others (Sequence[ChainLayer]): The layers to append.
        source (int): Value in place of their input.
    """
    first = len(layers)
    for conv, norm, act, read, residual in others:
        # Inputs are below 0.
        read = source if read < 0 else read + first
        if residual is not None:
            residual = source if residual < 0 else residual + first
        layers.append(ChainLayer(conv, norm, act, read, residual))
