"""Plan of a fused block: the steps that take the place of its calls."""

from typing import NamedTuple

from torch import fx, nn
from torch.nn.modules import pooling

from ..ops import source_of_input
from ..registry import default_registry
from .chain import Layers
from .eligibility import kind_of
from .sites import ConvNormAct, Site

# Shortcuts that change the resolution have one.
_POOLS = (pooling._AvgPoolNd, pooling._MaxPoolNd, nn.Identity)


def resolve(module, path):
    """A part of a module.

    Args:
        module (nn.Module): The module.
        path (tuple[str]): Names that lead to the part.

    Returns:
        nn.Module, optional: None if there is none.
    """
    for name in path:
        module = module._modules.get(name)
        if module is None:
            return None
    return module


class Slot(NamedTuple):
    """Place of a value among those of a run.

    Attributes:
        index (int): The place.
    """

    index: int


class Step(NamedTuple):
    """One step of a plan.

    Attributes:
        kind (str): ``'site'``, or what ``fx`` calls the operation.
        target (object): The site, or what is called: names that lead to a
            module, a function, the name of a method.
        args (object): Arguments; :class:`Slot` stands for a value.
        kwargs (dict): Likewise.
        output (int): Slot of the value.
        frees (tuple[int]): Slots that no later step reads.
    """

    kind: str
    target: object
    args: tuple
    kwargs: dict
    output: int
    frees: tuple


class Plan(NamedTuple):
    """Steps of a fused block, cached until what its trace rests on changes.

    Attributes:
        trace (Trace): The trace.
        steps (tuple[Step]): The steps.
        result (object): What is returned, of :class:`Slot` and constants.
        size (int): Number of slots. Those of the inputs come first.
        segments (dict[int, int]): From the index of a step to the end of the
            longest run of steps from it that may run as one chain.
        shared (tuple[int]): Slots of the inputs that several steps read.
        names (tuple[str]): Names of the inputs.
        sites (tuple[Site]): All sites.
        passed (tuple[tuple[str]]): Names that lead to further members of
            them, which a chain passes over.
        is_simple (bool): Whether its steps are sites that a chain can run,
            and calls of parts, and no more.
    """

    trace: object
    steps: tuple
    result: object
    size: int
    segments: dict
    shared: tuple
    names: tuple
    sites: tuple
    passed: tuple
    is_simple: bool


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
    """Plan of a block.

    Args:
        module (nn.Module): The block.
        trace (Trace): Its trace.
        sites (Sequence[Site]): See :func:`choose_sites`.
        plans (dict[nn.Module, Plan]): Plans of its parts, of those that have
            some.

    Returns:
        Plan, optional: None if nothing would run otherwise than its calls.
    """
    order = _schedule(module, trace, sites, plans)
    slots = {node: i for i, node in enumerate(trace.inputs)}
    steps = []
    for item in order:
        node = item.nodes[-1] if isinstance(item, Site) else item
        slots[node] = len(slots)
        steps.append(_make_step(item, slots))
    (result,) = _with_slots(trace.output.args, slots)
    steps = _free(steps, result, len(trace.inputs))
    segments = _find_segments(module, steps, result, plans)
    if not sites and not segments:
        return None
    readers = [_slots_of((step.args, step.kwargs)) for step in steps]
    shared = tuple(
        i
        for i in range(len(trace.inputs))
        if sum(i in slots for slots in readers) > 1
    )
    placed = tuple(step.target for step in steps if step.kind == 'site')
    return Plan(
        trace,
        tuple(steps),
        result,
        len(slots),
        segments,
        shared,
        tuple(node.target for node in trace.inputs),
        placed,
        tuple(name for site in placed for name in site.members[3:]),
        bool(steps)
        and all(
            step.kind == 'call_module' or is_chainable(step) for step in steps
        ),
    )


def choose_sites(block, registry=default_registry):
    """Sites of a block that do not overlap, those of later patterns first.

    Args:
        block (Block): The block.
        registry (Registry, optional): Where the patterns are. Defaults to
            that of the package.

    Returns:
        list[Site]: The sites.

    Raises:
        TypeError: If a pattern yields anything else.
        ValueError: If a site is no piece of the trace: with other calls than
            those of it, or inner values that are read outside of them.
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
        reason = 'reads what is no value of the trace'
    elif not nodes.isdisjoint(site.inputs):
        reason = 'reads what it makes itself'
    if reason is not None:
        raise ValueError(f'a site of the pattern {pattern!r} {reason}')


def _schedule(module, trace, sites, plans):
    """Calls and sites in an order in which they can run.

    A shortcut comes first, though forward passes mostly have it last: the
    backward pass then comes to it when the gradients of the other branch are
    gone.
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
        if _value(item) in shortcuts and _is_pure(item, module, plans)
    ]
    late = [item for item in items if item not in early]
    while early or late:
        movable = [item for item in early if ready.issuperset(_reads(item))]
        item = movable[0] if movable else (late or early)[0]
        (early if item in early else late).remove(item)
        order.append(item)
        ready.add(_value(item))
    return order


def _value(item):
    return item.nodes[-1] if isinstance(item, Site) else item


def _reads(item):
    return item.inputs if isinstance(item, Site) else item.all_input_nodes


def _is_pure(item, module, plans):
    """Whether a step depends on nothing but values: no random numbers."""
    if isinstance(item, Site):
        return True
    if item.op != 'call_module':
        return False
    part = module.get_submodule(item.target)
    return part in plans and _draws_nothing(part, plans)


def _draws_nothing(part, plans):
    """Whether a part is known to draw no random numbers of torch."""
    plan = plans.get(part)
    if plan is None:
        return isinstance(part, _POOLS) or kind_of(type(part)) is not None
    return all(
        step.kind == 'site'
        or (
            step.kind == 'call_module'
            and _draws_nothing(resolve(part, step.target), plans)
        )
        for step in plan.steps
    )


def _with_slots(arguments, slots):
    return fx.map_arg(arguments, lambda node: Slot(slots[node]))


def _make_step(item, slots):
    if isinstance(item, Site):
        args = tuple(Slot(slots[node]) for node in item.inputs)
        item_slot = slots[item.nodes[-1]]
        return Step('site', _Placed(item), args, {}, item_slot, ())
    target = item.target
    if item.op in ('call_module', 'get_attr'):
        target = tuple(target.split('.'))
    args, kwargs = _with_slots((item.args, item.kwargs), slots)
    return Step(item.op, target, args, kwargs, slots[item], ())


def _Placed(site):
    """A site without its nodes, which would keep the whole graph alive."""
    site.nodes = site.inputs = ()
    site.members = tuple(
        None if name is None else tuple(name.split('.'))
        for name in site.members
    )
    return site


def _slots_of(arguments):
    if isinstance(arguments, Slot):
        return {arguments.index}
    if isinstance(arguments, (tuple, list)):
        return set().union(*map(_slots_of, arguments))
    if isinstance(arguments, dict):
        return set().union(*map(_slots_of, arguments.values()))
    if isinstance(arguments, slice):
        return _slots_of((arguments.start, arguments.stop, arguments.step))
    return set()


def _free(steps, result, inputs):
    kept, freed = _slots_of(result), []
    for step in reversed(steps):
        read = _slots_of(step.args) | _slots_of(step.kwargs) | {step.output}
        freed.append(step._replace(frees=tuple(sorted(read - kept))))
        kept |= read
    return freed[::-1]


def _find_segments(module, steps, result, plans):
    """See :attr:`Plan.segments`."""

    def chains(step):
        if is_chainable(step):
            return True
        if step.kind != 'call_module' or step.kwargs or len(step.args) != 1:
            return False
        plan = plans.get(resolve(module, step.target))
        return plan is not None and bool(plan.sites) and plan.is_simple

    returned = _slots_of(result)
    segments = {}
    for start in range(len(steps)):
        end = start
        while end < len(steps) and chains(steps[end]):
            end += 1
        while end > start:
            inner = {step.output for step in steps[start : end - 1]}
            outside = returned.union(
                *(_slots_of(s.args) | _slots_of(s.kwargs) for s in steps[end:])
            )
            if inner.isdisjoint(outside):
                break
            end -= 1
        # Alone, a site with other steps around it is mostly a stem's, and
        # large.
        if end - start > 1 or (end > start and len(steps) == 1):
            if steps[end - 1].kind != 'site' and end - start == 1:
                continue
            segments[start] = end
    return segments


def chain_layers(module, plan, start, end, runner_of):
    """Layers of steps that follow one another.

    Args:
        module (nn.Module): The block.
        plan (Plan): Its plan.
        start (int): Index of the first step.
        end (int): One past the last.
        runner_of (Callable): Maps a part to the plan that it would run by
            now; None if it would not.

    Returns:
        tuple[list[Layers], list[int]] | None: The layers, and the slots of
        what they read; None if one of the steps does more.
    """
    layers, sources = [], _Sources()
    steps = plan.steps[start:end]
    if not _append_steps(layers, module, steps, sources, runner_of):
        return None
    return layers, sources.inputs


class _Sources(dict):
    """Sources of values by slot; those that no step fills are inputs."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def __missing__(self, slot):
        source = self[slot] = source_of_input(len(self.inputs))
        self.inputs.append(slot)
        return source


def _append_steps(layers, module, steps, sources, runner_of):
    for step in steps:
        read = [sources[slot.index] for slot in step.args]
        if step.kind == 'site':
            conv, norm, act, *_ = members_of(module, step.target)
            layers.append(Layers(conv, norm, act, *read))
        else:
            part = resolve(module, step.target)
            plan = runner_of(part)
            # Its only input has the first of its slots.
            if plan is None or len(plan.names) != 1:
                return False
            inner = dict(enumerate(read))
            if not _append_steps(layers, part, plan.steps, inner, runner_of):
                return False
        sources[step.output] = len(layers) - 1
    return True


def append_layers(layers, own, source):
    """Add layers of one input behind others.

    Args:
        layers (list[Layers]): The others, extended in place.
        own (Sequence[Layers]): The layers to add.
        source (int): Value that takes the place of their input.
    """
    first = len(layers)
    for conv, norm, act, read, added in own:
        # Inputs are below 0.
        read = source if read < 0 else read + first
        if added is not None:
            added = source if added < 0 else added + first
        layers.append(Layers(conv, norm, act, read, added))
