"""References to values of a run, in the arguments of calls."""

from typing import NamedTuple

from torch import fx


class ValueRef(NamedTuple):
    """Reference to a value of a run, in place of an argument.

    Attributes:
        slot (int): Index of the value in the table of values.
    """

    slot: int


def with_refs(arguments, slots):
    """Replace nodes of a graph by references.

    Args:
        arguments (object): Arguments of a call, nested as they may be.
        slots (dict[fx.Node, int]): Slots of the values of nodes.

    Returns:
        object: The arguments, with references.
    """
    return fx.map_arg(arguments, lambda node: ValueRef(slots[node]))


def fill(arguments, values):
    """Replace references by values.

    Args:
        arguments (object): Arguments of a call, nested as they may be.
        values (Sequence[object]): Values by slot.

    Returns:
        object: The arguments, with values.
    """
    kind = type(arguments)
    if kind is ValueRef:
        return values[arguments.slot]
    if isinstance(arguments, dict):
        return {k: fill(v, values) for k, v in arguments.items()}
    if isinstance(arguments, tuple):
        filled = [fill(argument, values) for argument in arguments]
        return kind(*filled) if hasattr(kind, '_fields') else tuple(filled)
    if isinstance(arguments, list):
        return [fill(argument, values) for argument in arguments]
    if kind is slice:
        parts = (arguments.start, arguments.stop, arguments.step)
        return slice(*fill(parts, values))
    return arguments


class WrittenCalls:
    """Calls of a forward pass as they are written, without their graph.

    Args:
        nodes (Sequence[fx.Node]): The calls, in their order.
        inputs (Sequence[fx.Node]): Values that they read.
        members (Sequence[str | None]): Qualified names of the modules that
            they call.
    """

    def __init__(self, nodes, inputs, members):
        slots = {node: i for i, node in enumerate((*inputs, *nodes))}
        self._calls = tuple(
            (
                node.op,
                members.index(node.target)
                if node.op == 'call_module'
                else node.target,
                with_refs(node.args, slots),
                with_refs(node.kwargs, slots),
            )
            for node in nodes
        )

    def __call__(self, layers, inputs):
        """Compute the value of the last call.

        Args:
            layers (Sequence[nn.Module | None]): The members.
            inputs (Sequence[object]): Values of the inputs.

        Returns:
            object: The value.
        """
        values = list(inputs)
        for op, target, args, kwargs in self._calls:
            args, kwargs = fill(args, values), fill(kwargs, values)
            if op == 'call_module':
                value = layers[target](*args, **kwargs)
            elif op == 'call_method':
                value = getattr(args[0], target)(*args[1:], **kwargs)
            else:
                value = target(*args, **kwargs)
            values.append(value)
        return values[-1]
