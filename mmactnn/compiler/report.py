"""Report on what compiled graphs keep for their backward passes."""

import dataclasses
import re
from collections import defaultdict

from .values import nbytes, value

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class KeptValue:
    """A value that a graph keeps.

    Attributes:
        module (str): Qualified name of the innermost module that computed
            it; ``''`` for the model itself and for inputs.
        op (str): Operation that computed it.
        kind (str): ``'codes'``, ``'bits'`` (of a predicate), ``'exact'`` or
            ``'input'`` (of the graph).
        bits (int, optional): Bits an element of codes.
        roles (tuple[str]): Fields of the level that set them.
        nbytes (int): Bytes as it is kept.
        exact_nbytes (int): Bytes as it was.
    """

    module: str
    op: str
    kind: str
    bits: int | None
    roles: tuple
    nbytes: int
    exact_nbytes: int


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """Values that one graph keeps.

    Attributes:
        kept (tuple[KeptValue]): Its values, parameters left out.
        copies (int): Copies of values in the network that was cut.
        seconds (float): Time that the partitioner took.
    """

    kept: tuple
    copies: int
    seconds: float

    @property
    def nbytes(self):
        """int: Bytes kept by the graph."""
        return sum(item.nbytes for item in self.kept)


class CompileReport:
    """Reports on the graphs of a compiled model, as they are compiled.

    Graphs that come from the compiler's cache on disk were partitioned by
    another process, and are missing.

    Attributes:
        graphs (list[GraphReport]): In the order of compilation.
    """

    def __init__(self):
        self.graphs = []

    @property
    def nbytes(self):
        """int: Bytes kept by all graphs."""
        return sum(graph.nbytes for graph in self.graphs)

    def by_module(self):
        """Bytes by module and kind.

        Returns:
            dict[tuple[str, str], int]: From names of modules and kinds.
        """
        totals = defaultdict(int)
        for graph in self.graphs:
            for item in graph.kept:
                totals[item.module, item.kind] += item.nbytes
        return dict(totals)

    def __str__(self):
        if not self.graphs:
            return (
                'no graph with a backward pass was partitioned yet (graphs '
                "from the compiler's cache do not show up)"
            )
        lines = []
        for i, graph in enumerate(self.graphs):
            lines.append(
                f'graph {i}: {graph.nbytes / _MIB:.2f} MiB kept, '
                f'partitioned in {graph.seconds:.1f} s'
            )
            for item in sorted(graph.kept, key=lambda k: -k.nbytes):
                bits = f' of {item.bits} bits' if item.bits else ''
                roles = f' ({", ".join(item.roles)})' if item.roles else ''
                lines.append(
                    f'  {item.nbytes / _MIB:10.3f} MiB  {item.kind}{bits}'
                    f'{roles}  {item.module or "-"}  {item.op}'
                )
        return '\n'.join(lines)


def describe(cut, payloads, bits, uses, tensors):
    """Values that a graph keeps.

    Args:
        cut (Cut): What is kept.
        payloads (dict[fx.Node, object]): Their payloads.
        bits (dict[fx.Node, int]): Bits of codes.
        uses (dict[fx.Node, list[Demand]]): Demands that codes serve.
        tensors (list[fx.Node]): What passes to the backward pass.

    Returns:
        tuple[KeptValue]: Without parameters and buffers.
    """
    passed, items, shown = set(tensors), [], set()
    for node, payload in payloads.items():
        kept = [n for n in payload.kept if n in passed]
        shown.update(kept)
        if kept:
            roles = sorted({d.role.value for d in uses.get(node, ())})
            items.append(
                KeptValue(
                    module_of(node),
                    _op_of(node),
                    'codes' if node in bits else 'bits',
                    bits.get(node),
                    tuple(roles),
                    sum(map(nbytes, kept)),
                    nbytes(node),
                )
            )
    for node in tensors:
        if node in shown or node in cut.joint.parameters:
            continue
        kind = 'input' if node.op == 'placeholder' else 'exact'
        size = nbytes(node)
        items.append(
            KeptValue(
                module_of(node), _op_of(node), kind, None, (), size, size
            )
        )
    return tuple(items)


def module_of(node):
    """Qualified name of the innermost module that computed a value.

    Args:
        node (fx.Node): The value.

    Returns:
        str: ``''`` where the graph does not tell.
    """
    stack = (
        node.meta.get('nn_module_stack')
        or node.meta.get('fwd_nn_module_stack')
        or {}
    )
    paths = [path for path, _ in stack.values()]
    path = paths[-1] if paths else ''
    path = re.sub(r"^L\['\w+'\]\.?", '', path)
    path = re.sub(r"\['?(\w+)'?\]", r'.\1', path)
    return path.replace('_modules.', '').strip('.')


def _op_of(node):
    shape = tuple(value(node).shape) if value(node) is not None else ()
    op = getattr(node.target, '__name__', node.target)
    return f'{op} {shape}'
