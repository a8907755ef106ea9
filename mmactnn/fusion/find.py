"""Search for the blocks of a model that can run fused."""

from typing import NamedTuple

from torch import nn

from ..layers import QuantizedLayer
from ..modules.naming import named_modules
from ..registry import default_registry
from .block import plain_class_of
from .eligibility import NORMS
from .patterns import Block
from .plan import choose_sites, make_plan, resolve
from .runner import BlockRunner
from .trace import UntraceableError, trace_block

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


class Fusion(NamedTuple):
    """A block that can run fused.

    Attributes:
        module (nn.Module): The block.
        runner (BlockRunner): Its plans.
        norms (tuple[nn.Module]): Normalisations that keep codes of the
            normalised value.
        relus (tuple[nn.Module]): ReLUs that keep codes of their output.
    """

    module: nn.Module
    runner: BlockRunner
    norms: tuple
    relus: tuple

    @property
    def patterns(self):
        """tuple[str]: Names of the patterns of its sites."""
        names = [s.pattern for p in self.runner.plans for s in p.sites]
        return tuple(dict.fromkeys(names))


class FoundFusions(NamedTuple):
    """Result of a search.

    Attributes:
        fusions (dict[str, Fusion]): Blocks to be fused, by qualified name.
        unfused (dict[str, tuple[nn.Module, str]]): Blocks with
            normalisations that run layer by layer, with the reason, by
            qualified name.
    """

    fusions: dict
    unfused: dict


def find_fusions(model, class_of):
    """Find the blocks of a model that can run fused.

    Args:
        model (nn.Module): The model, converted or about to be.
        class_of (Callable): Maps a layer to its compressed class, present or
            planned; to None if it takes no part.

    Returns:
        FoundFusions: The blocks; the model is not changed.
    """
    search = _Search(class_of)
    modules = [
        (name, module)
        for name, module in named_modules(model)
        if not isinstance(module, (*_CONTAINERS, QuantizedLayer))
        and next(module.children(), None) is not None
    ]
    for name, module in reversed(modules):
        search.trace(name, module)
    for name, module in reversed(modules):
        search.plan(name, module)
    return FoundFusions(search.fusions, search.unfused)


def plan_again(module):
    """Plan a block that comes from a pickle.

    Args:
        module (nn.Module): The block, with its layers compressed.

    Returns:
        BlockRunner: The runner; without plans if the block cannot be traced
        any more.
    """

    def class_of(layer):
        quantizer = getattr(layer, 'quantizer', None)
        return None if quantizer is None or quantizer.exact else type(layer)

    found = find_fusions(module, class_of)
    for name, fusion in found.fusions.items():
        if name:
            fusion.module.__dict__['_fused'] = fusion.runner
    if '' in found.fusions:
        return found.fusions[''].runner
    return BlockRunner(())


class _Search:
    """State of a search.

    Args:
        class_of (Callable): See :func:`find_fusions`.

    Attributes:
        fusions (dict[str, Fusion]): See :class:`FoundFusions`.
        unfused (dict[str, tuple[nn.Module, str]]): Likewise.
    """

    def __init__(self, class_of):
        self.fusions = {}
        self.unfused = {}
        self._class_of = class_of
        # By class: a trace holds for all modules of it on which its guards
        # hold.
        self._traces_of_class = {}
        self._traces = {}
        self._shortcuts = set()
        self._plans = {}

    def trace(self, name, module):
        """Trace a module, and note which of its parts are shortcuts."""
        parts = list(_parts(module))
        classes = {self._class_of(part) for part in parts}
        has_layers = any(map(self._is_in_patterns, classes))
        has_blocks = len(parts) > 1 and all(
            part in self._traces or type(part) is nn.Identity for part in parts
        )
        if not has_layers and not has_blocks:
            return
        try:
            traces = self._find_traces(module)
        except UntraceableError as reason:
            if not classes.isdisjoint(NORMS):
                self.unfused[name] = module, str(reason)
            return
        self._traces[module] = traces
        for trace in traces:
            block = Block(module, trace, self._class_of)
            for site in choose_sites(block):
                for node in site.inputs[1:] if site.adds else ():
                    if node.op == 'call_module' and len(node.users) == 1:
                        part = module.get_submodule(node.target)
                        self._shortcuts.add(part)

    def _is_in_patterns(self, cls):
        """Whether a pattern is registered for a class of layers."""
        return cls is not None and any(
            not entry.layers or issubclass(cls, entry.layers)
            for entry in default_registry.patterns.values()
        )

    def plan(self, name, module):
        """Plan a module whose parts are planned already."""
        traces = self._traces.get(module)
        if traces is None:
            return
        plans, norms, relus = [], {}, {}
        for trace in traces:
            block = Block(
                module, trace, self._class_of, module in self._shortcuts
            )
            plan = make_plan(module, trace, choose_sites(block), self._plans)
            if plan is None:
                continue
            plans.append(plan)
            for site in plan.sites:
                norms.update(_layers(module, site.norms))
                relus.update(_layers(module, site.relus))
        if plans:
            self._plans[module] = plans[0]
            self.fusions[name] = Fusion(
                module, BlockRunner(plans), tuple(norms), tuple(relus)
            )
        elif any(self._class_of(part) in NORMS for part in _parts(module)):
            reason = 'no pattern matches its forward pass'
            self.unfused[name] = module, reason

    def _find_traces(self, module):
        """Traces of a module, known ones where their guards hold."""
        cls = plain_class_of(module)
        known = self._traces_of_class.setdefault(cls, [])
        if 'forward' not in module.__dict__:
            for traces in known:
                if all(trace.guards.hold(module, cls) for trace in traces):
                    return traces
        traces = trace_block(module, cls)
        known.append(traces)
        return traces


def _parts(module):
    """Children of a module, with containers replaced by their children."""
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            yield from _parts(child)
        else:
            yield child


def _layers(module, names):
    return {resolve(module, tuple(name.split('.'))): None for name in names}
