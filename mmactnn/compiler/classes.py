"""Classes of operations: the table that the partitioner looks them up in.

A value may be kept as codes if the backward pass is linear in it: the
expectation of a gradient is then that of exact values. Whatever the table
does not hold takes exact values, which costs memory and never a bias.
"""

import operator
from typing import NamedTuple

import torch

aten, prims = torch.ops.aten, torch.ops.prims


def packet(node):
    """Operation of a node without its overload.

    Args:
        node (fx.Node): Any node.

    Returns:
        object: An ``OpOverloadPacket``, a function, or None for nodes that
        call none.
    """
    if node.op != 'call_function':
        return None
    return getattr(node.target, 'overloadpacket', node.target)


def _existing(namespace, *names):
    """Operations of these names; torch's versions do not all have all."""
    return {getattr(namespace, n) for n in names if hasattr(namespace, n)}


# Elements move, and are otherwise as they were.
VIEWS = {operator.getitem} | _existing(
    aten,
    *('view', '_unsafe_view', 'reshape', 'permute', 't', 'transpose'),
    *('expand', 'squeeze', 'unsqueeze', 'slice', 'select', 'alias', 'clone'),
    *('split', 'split_with_sizes', 'unbind', 'as_strided', 'detach', 'roll'),
    *('flip', 'contiguous'),
)
CASTS = _existing(prims, 'convert_element_type') | {aten._to_copy}
# Affine in all of their tensors.
AFFINE = (
    VIEWS
    | CASTS
    | _existing(
        aten,
        *('add', 'sub', 'rsub', 'neg', 'cat', 'constant_pad_nd', 'stack'),
    )
)
# Linear in the first tensor, the others being indices or divisors.
LINEAR_IN_FIRST = _existing(
    aten, 'index', '_unsafe_index', 'gather', 'div', 'index_select'
)
# Linear in each of their factors.
PRODUCTS = {aten.mul}
MATRIX_PRODUCTS = _existing(aten, 'mm', 'bmm', 'addmm', 'baddbmm')
# Results are kept rather than computed twice.
EXPENSIVE = MATRIX_PRODUCTS | _existing(
    aten, 'convolution', 'convolution_backward', 'dot', 'mv'
)
# Two calls have two results.
RANDOM = _existing(
    aten,
    *('rand', 'rand_like', 'randn', 'randn_like', 'bernoulli', 'randint'),
    *('native_dropout', 'randperm', 'normal_functional', 'uniform'),
    *('multinomial',),
)
CONSTANTS = _existing(
    aten,
    *('full', 'arange', 'zeros', 'ones', 'full_like', 'zeros_like'),
    *('ones_like', 'scalar_tensor', 'empty', 'new_zeros', 'new_ones'),
    *('lift_fresh_copy', 'new_full'),
)


def _late(name):
    """A primitive of Inductor's, which exists once Inductor is imported."""
    try:
        return getattr(prims, name)
    except AttributeError:
        return None


def is_fused_multiply_add(op):
    """Whether an operation is ``a * b + c`` in one."""
    return op is not None and op == _late('fma')


def is_cheap_to_repeat(op):
    """Whether an operation is as cheap as a pointwise one, untagged."""
    names = '_low_memory_max_pool_offsets_to_indices', 'inductor_lookup_seed'
    return op is not None and any(op == _late(name) for name in names)


def is_random(op):
    """Whether two calls of an operation have two results."""
    return op in RANDOM or (
        op is not None and op in (_late('inductor_seeds'), _late('seed'))
    )


class _Linear(NamedTuple):
    """Arguments that an operation of the backward pass is linear in."""

    positions: tuple


_LINEAR_USES = {
    op: _Linear(positions)
    for ops, positions in (
        (_existing(aten, 'mm', 'bmm', 'dot', 'mv', 'mul'), (0, 1)),
        (_existing(aten, 'addmm', 'baddbmm'), (0, 1, 2)),
        (_existing(aten, 'add', 'sub'), (0, 1)),
        (_existing(aten, 'convolution'), (0, 1)),
        (_existing(aten, 'convolution_backward'), (0, 1, 2)),
        (_existing(aten, 'where'), (1, 2)),
        (_existing(aten, 'div'), (0,)),
    )
    for op in ops
}


def register_linear_use(op, argument):
    """Declare that an operation's result is linear in one of its arguments.

    Where the operation occurs in a backward pass, that argument may then be
    kept as few-bit codes. The result must be linear (or affine) in it for
    every fixed value of the others; otherwise gradients are biased.

    Args:
        op (OpOverloadPacket | OpOverload): The operation, such as
            ``torch.ops.mylib.deform_backward``.
        argument (int): Position of the argument.

    Raises:
        TypeError: If ``op`` is no operation of torch's dispatcher, or
            ``argument`` no integer.
        ValueError: If the operation has no such argument, or it is no
            tensor.
    """
    op = getattr(op, 'overloadpacket', op)
    if not isinstance(op, torch._ops.OpOverloadPacket):
        raise TypeError(
            f'op must be an operation such as torch.ops.aten.mm, got {op!r}'
        )
    if not isinstance(argument, int) or isinstance(argument, bool):
        raise TypeError(f'argument must be a position, got {argument!r}')
    for name in op.overloads():
        arguments = getattr(op, name)._schema.arguments
        if not 0 <= argument < len(arguments):
            continue
        if 'Tensor' in str(arguments[argument].type):
            before = _LINEAR_USES.get(op, _Linear(()))
            _LINEAR_USES[op] = _Linear(
                tuple(sorted({*before.positions, argument}))
            )
            return
    raise ValueError(
        f'argument must be the position of a tensor of {op}, got {argument}'
    )


def is_linear_in(op, position):
    """Whether an operation of the backward pass is linear in an argument.

    Args:
        op (OpOverloadPacket): The operation.
        position (int): Position of the argument.
    """
    if is_fused_multiply_add(op):
        return position in (0, 1, 2)
    use = _LINEAR_USES.get(op)
    return use is not None and position in use.positions


def table_of_linear_uses():
    """Names and positions of the table, for keys of caches.

    Returns:
        list[tuple[str, tuple[int]]]: Sorted.
    """
    return sorted((str(op), u.positions) for op, u in _LINEAR_USES.items())
