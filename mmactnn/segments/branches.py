"""Blocks cut into branches, each a segment of its own.

While a segment runs again, everything that it computes lives. A block with a
stream of which one tensor is left between two branches, ``x + f(x)`` and then
``x + g(x)``, runs as two segments: half of it lives at a time, for codes of
one tensor more.
"""

import functools
from typing import NamedTuple

import torch

from ..fusion.plan import make_steps
from ..fusion.runner import bind, run_step
from ..fusion.trace import UntraceableError, checks_types, trace_block
from ..modules.execution import is_ordinary

# Least share of a block by which a cut must lower what lives at once.
_MIN_GAIN = 1 / 8


class Branch(NamedTuple):
    """One of the segments of a block.

    Attributes:
        steps (tuple[Step]): Calls in their order.
        reads (tuple[int]): Slots of the values from before that it reads.
        output (int): Slot of its result.
    """

    steps: tuple
    reads: tuple
    output: int


class BranchPlan(NamedTuple):
    """Branches of a block, valid while the guards of its trace hold.

    Attributes:
        trace (Trace): The trace.
        input_names (tuple[str]): Names of the inputs, which have the first
            slots.
        branches (tuple[Branch]): The branches.
        num_slots (int): Number of slots.
        tensors_only (bool): Whether the trace holds for tensors only.
    """

    trace: object
    input_names: tuple
    branches: tuple
    num_slots: int
    tensors_only: bool


class Branches:
    """Branches of one block, found when it first runs by them.

    Args:
        sizes (dict[str, float]): Channels that parts of the block keep while
            it runs again, by their names in it.
    """

    def __init__(self, sizes):
        self._sizes = sizes
        self._plans = None
        self._last_parts = {}

    def __deepcopy__(self, memo):
        return Branches(self._sizes)

    def __reduce__(self):
        # Traces refer to dicts of globals.
        return Branches, (self._sizes,)

    def find(self, module, cls, args, kwargs):
        """Find the plan of a call.

        Args:
            module (nn.Module): The block, in training mode.
            cls (type): Its class before it was a segment.
            args (tuple): Arguments of the call.
            kwargs (dict): Keyword arguments of the call.

        Returns:
            tuple[BranchPlan, list] | None: The plan and its inputs; None if
            the block has to run as one segment.
        """
        if self._plans is None:
            self._plans = _plan(module, cls, self._sizes)
        for plan in self._plans:
            inputs = bind(plan, args, kwargs)
            if (
                inputs is not None
                and is_ordinary(inputs[0])
                and all(
                    is_ordinary(value)
                    or not (
                        plan.tensors_only or isinstance(value, torch.Tensor)
                    )
                    for value in inputs[1:]
                )
                and plan.trace.guards.hold(module, cls, self._last_parts)
            ):
                return plan, inputs
        return None


def run_branches(module, plan, inputs, run):
    """Run a block branch by branch.

    Args:
        module (nn.Module): The block.
        plan (BranchPlan): See :meth:`Branches.find`.
        inputs (list[object]): The inputs, see there; emptied.
        run (Callable): Runs a segment: its number, a function, arguments and
            keyword arguments.

    Returns:
        Tensor[*]: Result of the block.
    """
    count = len(inputs)
    values = [*inputs, *[None] * (plan.num_slots - count)]
    inputs.clear()
    for i, branch in enumerate(plan.branches):
        function = functools.partial(_run_branch, module, plan, branch)
        arguments = tuple(values[slot] for slot in branch.reads)
        for slot in branch.reads:
            # Other arguments are for all branches.
            if slot >= count or slot == 0:
                values[slot] = None
        values[branch.output] = run(i, function, arguments, {})
    return values[plan.branches[-1].output]


def _run_branch(module, plan, branch, *arguments):
    values = [None] * plan.num_slots
    for slot, value in zip(branch.reads, arguments):
        values[slot] = value
    del arguments
    for step in branch.steps:
        values[step.output] = run_step(module, step, values)
        for slot in step.frees:
            values[slot] = None
    return values[branch.output]


def _plan(module, cls, sizes):
    """Plans of a block, by its class's forward pass."""
    try:
        traces = trace_block(module, cls)
    except UntraceableError:
        return ()
    plans = (
        _plan_trace(trace, checks_types(cls), sizes)
        for trace in traces
        if trace.input_type is torch.Tensor
    )
    return tuple(plan for plan in plans if plan is not None)


def _plan_trace(trace, tensors_only, sizes):
    (result,) = trace.output.args
    if result not in trace.calls:
        return None
    branches = _cut(trace.calls, _borders(trace), sizes)
    if len(branches) < 2:
        return None
    nodes = (*trace.inputs, *trace.calls)
    slots = {node: i for i, node in enumerate(nodes)}
    return BranchPlan(
        trace,
        tuple(node.target for node in trace.inputs),
        tuple(_make_branch(calls, slots) for calls in branches),
        len(slots),
        tensors_only,
    )


def _cut(calls, borders, sizes):
    """Calls of each branch; the heaviest is cut as long as that pays."""

    def size(part):
        return sum(
            sizes.get(node.target, 0)
            for node in part
            if node.op == 'call_module'
        )

    branches = [tuple(calls)]
    least = _MIN_GAIN * size(calls)
    while True:
        heaviest = max(branches, key=size)
        i = branches.index(heaviest)
        others = [size(b) for b in branches[:i] + branches[i + 1 :]]
        halves, peak = None, size(heaviest)
        for at, node in enumerate(heaviest[:-1], 1):
            cut = heaviest[:at], heaviest[at:]
            largest = max(*others, *map(size, cut))
            if node in borders and largest < peak:
                halves, peak = cut, largest
        if halves is None or size(heaviest) - peak < least:
            return branches
        branches[i : i + 1] = halves


def _borders(trace):
    """Calls after which their value alone is read, but for arguments."""
    # The stream is the first argument, and the others go to all branches.
    position = {node: i for i, node in enumerate(trace.calls)}
    last = {
        node: max(position.get(u, len(position)) for u in node.users)
        for node in (trace.inputs[0], *trace.calls)
        if node.users
    }
    return {
        node
        for i, node in enumerate(trace.calls)
        if not any(
            position.get(other, -1) < i < at
            for other, at in last.items()
            if other is not node
        )
        and node.op != 'get_attr'
    }


def _make_branch(calls, slots):
    steps = make_steps(calls, slots, calls[-1])
    inside = set(calls)
    reads = dict.fromkeys(
        slots[node]
        for call in calls
        for node in call.all_input_nodes
        if node not in inside
    )
    return Branch(steps, tuple(sorted(reads)), slots[calls[-1]])
