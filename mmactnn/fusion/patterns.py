"""Patterns over the trace of a block."""

import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..layers import QReLU
from ..registry import register_pattern
from .eligibility import NORMS, is_convolution
from .sites import ConvNormAct

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_RELUS = (F.relu, torch.relu, F.relu_, torch.relu_)
# Layers that read nothing of their input but codes of it.
_READERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class Block:
    """The trace of a module, beside what its layers are about to be.

    Args:
        module (nn.Module): The module.
        trace (Trace): Its trace.
        class_of (Callable): Maps a layer to the compressed class that it has
            or is about to have at this level; to None if it stays exact.
        is_shortcut (bool, optional): Whether what the module returns is added
            to a normalised value. Defaults to False.
    """

    def __init__(self, module, trace, class_of, is_shortcut=False):
        self.module = module
        self.trace = trace
        self.is_shortcut = is_shortcut
        self._class_of = class_of
        self._calls = set(trace.calls)

    def layer(self, node):
        """The module that a node calls, with one argument and no other.

        Args:
            node (fx.Node): The node.

        Returns:
            nn.Module, optional: None if it does anything else.
        """
        if node.op != 'call_module' or len(node.args) != 1 or node.kwargs:
            return None
        if node.args[0] not in self._calls and (
            node.args[0] not in self.trace.inputs
        ):
            return None
        return self.module.get_submodule(node.target)

    def compressed_class(self, node):
        """The compressed class of the layer that a node calls.

        Args:
            node (fx.Node): The node.

        Returns:
            type, optional: None if the layer stays exact, or is none.
        """
        layer = self.layer(node)
        return None if layer is None else self._class_of(layer)

    def only_user(self, node):
        """The node that alone reads a value, once; None if there is none.

        Args:
            node (fx.Node): The node whose value it is.
        """
        users = list(node.users)
        if len(users) != 1 or users[0] not in self._calls:
            return None
        return users[0]


@register_pattern('conv_norm_act', layers=(*NORMS, QReLU))
def match_conv_norm_act(block):
    """Convolution, normalisation, addition and ReLU.

    Args:
        block (Block): The block.

    Yields:
        ConvNormAct: The places that fit.
    """
    finder = _Finder(block)
    sums = {}
    for node in block.trace.calls:
        if block.compressed_class(node) in NORMS:
            site = finder.from_norm(node)
            if site is None:
                continue
            if len(site.inputs) == 2:
                # Of two normalisations of a sum, one is the shortcut's.
                other = sums.setdefault(site.nodes[-1], site)
                if other is not site:
                    if finder.is_left(site):
                        sums[site.nodes[-1]] = site
                continue
            yield site
        elif finder.is_conv(node):
            site = finder.from_conv(node)
            if site is not None:
                yield site
    yield from sums.values()
    for site in sums.values():
        shortcut = finder.shortcut(site.inputs[1])
        if shortcut is not None:
            yield shortcut
    if block.is_shortcut:
        (result,) = block.trace.output.args
        shortcut = finder.shortcut(result)
        if shortcut is not None:
            yield shortcut


class _Finder:
    def __init__(self, block):
        self._block = block

    def is_conv(self, node):
        layer = self._block.layer(node)
        return layer is not None and is_convolution(layer)

    def from_conv(self, node):
        """A convolution right before a ReLU."""
        relu = self._block.only_user(node)
        if relu is None or self._block.compressed_class(relu) is not QReLU:
            return None
        if not self._may_keep_codes(relu):
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

    def _may_keep_codes(self, relu):
        """Whether codes of a ReLU's output may serve those that read it."""
        layers = [self._block.layer(user) for user in relu.users]
        return any(
            layer is None or isinstance(layer, _READERS) or _has_parts(layer)
            for layer in layers
        )

    def from_norm(self, node):
        """A normalisation with what is before and behind it."""
        nodes, source, conv = self._before(node)
        last, passed = self._pass_over(node, nodes)
        user = self._block.only_user(last)
        if user is None:
            return None
        if self._is_relu(user):
            act = self._name_of_relu(user)
            nodes.append(user)
            return ConvNormAct(
                nodes,
                source,
                None,
                conv,
                node.target,
                act,
                True,
                passed,
                relu=_function_of(user, last),
            )
        added = self._operand(user, last)
        relu = None if added is None else self._block.only_user(user)
        if relu is None or not self._is_relu(relu):
            return None
        nodes += user, relu
        act = self._name_of_relu(relu)
        return ConvNormAct(
            nodes,
            source,
            added,
            conv,
            node.target,
            act,
            True,
            passed,
            _function_of(user, last, added),
            _function_of(relu, user),
        )

    def shortcut(self, node):
        """A normalisation whose output is added to another one's."""
        if (
            node not in self._block.trace.calls
            or self._block.compressed_class(node) not in NORMS
            or len(node.users) != 1
        ):
            return None
        nodes, source, conv = self._before(node)
        return ConvNormAct(nodes, source, None, conv, node.target, None, False)

    def is_left(self, site):
        """Whether a site's normalisation is the left operand of its sum."""
        total = site.nodes[-2]
        return site.nodes[-3] is total.args[0]

    def _before(self, norm):
        source = norm.args[0]
        if self._block.only_user(source) is norm and self.is_conv(source):
            return [source, norm], source.args[0], source.target
        return [norm], source, None

    def _pass_over(self, node, nodes):
        passed = []
        while True:
            user = self._block.only_user(node)
            if user is None or type(self._block.layer(user)) is not (
                nn.Identity
            ):
                return node, passed
            passed.append(user.target)
            nodes.append(user)
            node = user

    def _is_relu(self, node):
        if node.op == 'call_module':
            return self._block.compressed_class(node) is QReLU
        if node.op == 'call_function' and node.target in _RELUS:
            return True
        return node.op == 'call_method' and node.target in ('relu', 'relu_')

    @staticmethod
    def _name_of_relu(node):
        return node.target if node.op == 'call_module' else None

    @staticmethod
    def _operand(node, value):
        """What a node adds to a value; None if it does anything else."""
        adds = (node.op == 'call_function' and node.target in _ADDITIONS) or (
            node.op == 'call_method' and node.target in ('add', 'add_')
        )
        if not adds or len(node.args) != 2 or node.kwargs:
            return None
        left, right = node.args
        if left is value:
            other = right
        elif node.target in (operator.iadd, 'add_'):
            # It writes to the other one, which others may read.
            return None
        else:
            other = left
        return other if hasattr(other, 'op') and other is not value else None


def _function_of(node, *operands):
    """What a node computes of its operands, as a function of their values."""
    if node.op == 'call_module':
        return None
    return _Call(
        node.op == 'call_method',
        node.target,
        fx.map_arg(node.args, lambda n: _Operand(operands.index(n))),
        dict(node.kwargs),
    )


class _Operand(int):
    """Place of a value among the arguments of a call."""


class _Call(NamedTuple):
    """A call of a function or method, of values that are given later."""

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
