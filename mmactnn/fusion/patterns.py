"""Patterns over the trace of a block."""

import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..layers import QReLU
from ..layers.smooth import KnownFunction
from ..registry import register_pattern
from .eligibility import NORMS, is_convolution
from .sites import ConvNormAct, NormSmooth

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_RELUS = (F.relu, torch.relu, F.relu_, torch.relu_)
# Layers that keep codes of their input for the backward pass.
_CODE_READERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class Block:
    """A module with its trace and the compressed classes of its layers.

    Args:
        module (nn.Module): The module.
        trace (Trace): Its trace.
        class_of (Callable): Maps a layer to its compressed class at this
            level, present or planned; to None if it stays exact.
        is_shortcut (bool, optional): Whether the output of the module is
            added to a normalised value. Defaults to False.

    Attributes:
        calls (set[fx.Node]): Calls of the trace.
    """

    def __init__(self, module, trace, class_of, is_shortcut=False):
        self.module = module
        self.trace = trace
        self.is_shortcut = is_shortcut
        self._class_of = class_of
        self.calls = set(trace.calls)

    def layer(self, node):
        """The module that a node calls with one argument.

        Args:
            node (fx.Node): The node.

        Returns:
            nn.Module, optional: None if the node is no such call.
        """
        if node.op != 'call_module' or len(node.args) != 1 or node.kwargs:
            return None
        if node.args[0] not in self.calls and (
            node.args[0] not in self.trace.inputs
        ):
            return None
        return self.module.get_submodule(node.target)

    def compressed_class(self, node):
        """The compressed class of the layer that a node calls.

        Args:
            node (fx.Node): The node.

        Returns:
            type, optional: None if the layer stays exact, or the node calls
            none.
        """
        layer = self.layer(node)
        return None if layer is None else self._class_of(layer)

    def only_user(self, node):
        """The only node that reads a value.

        Args:
            node (fx.Node): The node of the value.

        Returns:
            fx.Node, optional: None if there is no such node, or several.
        """
        users = list(node.users)
        if len(users) != 1 or users[0] not in self.calls:
            return None
        return users[0]


@register_pattern('conv_norm_act', layers=(*NORMS, QReLU))
def match_conv_norm_act(block):
    """Match convolution, normalisation, addition and ReLU.

    Args:
        block (Block): The block.

    Yields:
        ConvNormAct: The sites.
    """
    finder = _Finder(block)
    sums = {}
    for node in block.trace.calls:
        if block.compressed_class(node) in NORMS:
            site = finder.from_norm(node)
            if site is None:
                continue
            if len(site.inputs) == 2:
                # If both operands of a sum are normalised, the right one is
                # the shortcut.
                relu = site.nodes[-1]
                if relu not in sums or finder.is_left(site):
                    sums[relu] = site
                continue
            yield site
        elif finder.is_conv(node):
            site = finder.from_conv(node)
            if site is not None:
                yield site
    yield from sums.values()
    shortcuts = [site.inputs[1] for site in sums.values()]
    if block.is_shortcut:
        shortcuts += block.trace.output.args
    for node in shortcuts:
        site = finder.from_shortcut(node)
        if site is not None:
            yield site


@register_pattern('norm_smooth', layers=NORMS)
def match_norm_smooth(block):
    """Match convolution, normalisation and smooth activation.

    Args:
        block (Block): The block.

    Yields:
        NormSmooth: The sites.
    """
    finder = _Finder(block)
    for node in block.trace.calls:
        if block.compressed_class(node) in NORMS:
            site = finder.with_smooth(node)
            if site is not None:
                yield site


class _Finder:
    """Search for the sites of a block, from one of their nodes."""

    def __init__(self, block):
        self._block = block

    def is_conv(self, node):
        layer = self._block.layer(node)
        return layer is not None and is_convolution(layer)

    def from_conv(self, node):
        """Site of a convolution with a ReLU behind it, or None."""
        relu = self._block.only_user(node)
        if relu is None or self._block.compressed_class(relu) is not QReLU:
            return None
        if not self._can_keep_codes(relu):
            return None
        return ConvNormAct(
            (node, relu),
            node.args[0],
            None,
            node.target,
            None,
            relu.target,
            True,
        )

    def _can_keep_codes(self, relu):
        """Whether a reader of a ReLU's output may share codes of it."""
        layers = [self._block.layer(user) for user in relu.users]
        return any(
            layer is None
            or isinstance(layer, _CODE_READERS)
            or _has_parts(layer)
            for layer in layers
        )

    def from_norm(self, node):
        """Site of a normalisation with a ReLU behind it, or None."""
        nodes, source, conv = self._producers(node)
        last, identities = self._skip_identities(node, nodes)
        user = self._block.only_user(last)
        if user is None:
            return None
        residual = add = None
        if not self._is_relu(user):
            residual = self._operand(user, last)
            if residual is None:
                return None
            add = _function_of(user, last, residual)
            nodes.append(user)
            last, user = user, self._block.only_user(user)
            if user is None or not self._is_relu(user):
                return None
        nodes.append(user)
        return ConvNormAct(
            nodes,
            source,
            residual,
            conv,
            node.target,
            self._relu_name(user),
            True,
            identities,
            add,
            _function_of(user, last),
        )

    def from_shortcut(self, node):
        """Site of a shortcut that ends in a normalisation, or None."""
        if (
            node not in self._block.trace.calls
            or self._block.compressed_class(node) not in NORMS
            or len(node.users) != 1
        ):
            return None
        nodes, source, conv = self._producers(node)
        return ConvNormAct(nodes, source, None, conv, node.target, None, False)

    def with_smooth(self, node):
        """Site of a normalisation with a smooth activation, or None."""
        act = self._block.only_user(node)
        cls = None if act is None else self._block.compressed_class(act)
        if (
            cls is None
            or not issubclass(cls, KnownFunction)
            # It may still be the torch parent, whose attributes suffice.
            or not cls.smooth_function(self._block.layer(act)).one_code
        ):
            return None
        nodes, source, conv = self._producers(node)
        return NormSmooth([*nodes, act], source, conv, node.target, act.target)

    def is_left(self, site):
        """Whether a site's normalisation is the left operand of its sum."""
        total = site.nodes[-2]
        return site.nodes[-3] is total.args[0]

    def _producers(self, norm):
        """Nodes up to a normalisation, their input, the convolution's name."""
        source = norm.args[0]
        if self._block.only_user(source) is norm and self.is_conv(source):
            return [source, norm], source.args[0], source.target
        return [norm], source, None

    def _skip_identities(self, node, nodes):
        """Last node of a series of identities, and their names."""
        identities = []
        while True:
            user = self._block.only_user(node)
            if user is None or type(self._block.layer(user)) is not (
                nn.Identity
            ):
                return node, identities
            identities.append(user.target)
            nodes.append(user)
            node = user

    def _is_relu(self, node):
        if node.op == 'call_module':
            return self._block.compressed_class(node) is QReLU
        if node.op == 'call_function' and node.target in _RELUS:
            return True
        return node.op == 'call_method' and node.target in ('relu', 'relu_')

    @staticmethod
    def _relu_name(node):
        return node.target if node.op == 'call_module' else None

    @staticmethod
    def _operand(node, value):
        """Value that a node adds to another one; None if it adds none."""
        adds = (node.op == 'call_function' and node.target in _ADDITIONS) or (
            node.op == 'call_method' and node.target in ('add', 'add_')
        )
        if not adds or len(node.args) != 2 or node.kwargs:
            return None
        left, right = node.args
        if left is value:
            other = right
        elif node.target in (operator.iadd, 'add_'):
            # It writes to the other operand, which other nodes may read.
            return None
        else:
            other = left
        return other if hasattr(other, 'op') and other is not value else None


def _function_of(node, *operands):
    """The call of a node, as a function of the values of its operands."""
    if node.op == 'call_module':
        return None
    return _Call(
        node.op == 'call_method',
        node.target,
        fx.map_arg(node.args, lambda n: _Operand(operands.index(n))),
        dict(node.kwargs),
    )


class _Operand(int):
    """Index of an operand, in place of an argument."""


class _Call(NamedTuple):
    """A call of a function or method, without its operands."""

    is_method: bool
    target: object
    args: tuple
    kwargs: dict

    def __call__(self, *values):
        args = [
            values[arg] if type(arg) is _Operand else arg for arg in self.args
        ]
        if self.is_method:
            owner, *args = args
            return getattr(owner, self.target)(*args, **self.kwargs)
        return self.target(*args, **self.kwargs)


def _has_parts(module):
    return next(module.children(), None) is not None
