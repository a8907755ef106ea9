"""The ops of a chain as calls of others, for tensors without data and graphs.

A graph holds no op that writes to its arguments and returns lists: there the
forward pass is its parts. Of the backward pass it needs the shapes alone.
"""

import itertools

import torch

from ._fake import fake, parts
from .conv_chain import PARAMETERS, Follows, Kept, Link, is_input

_BUFFERS = 3


def read_links(numbers):
    """The links of a plan.

    Args:
        numbers (Sequence[int]): See :class:`ChainPlan`.

    Returns:
        list[Link]: The links.
    """
    links, left = [], iter(numbers)

    def take(count):
        return tuple(itertools.islice(left, count))

    for source in left:
        added = next(left) if next(left) else None
        layer, dims = take(2)
        window = take(dims), take(dims), take(dims)
        groups, follows, of_batch = take(3)
        links.append(
            Link(
                source,
                added,
                layer,
                *window,
                groups,
                Follows(follows),
                bool(of_batch),
                *take(3),
            )
        )
    return links


def _layout(tensor):
    return [tensor.dim(), *tensor.shape, *tensor.stride()]


def _read_layouts(numbers):
    layouts, left = [], iter(numbers)
    for dims in left:
        size = tuple(itertools.islice(left, dims))
        layouts.append((size, tuple(itertools.islice(left, dims))))
    return layouts


def _with_strides(tensor, strides):
    if tensor.stride() == strides:
        return tensor
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def _read(source, inputs, outputs):
    return inputs[~source] if is_input(source) else outputs[source]


def _encode(input, kind, bits, group_size, seed, offset):
    ops = torch.ops.mmactnn
    if kind == Kept.PLAIN:
        return ops.quantize.default(input, bits, group_size, seed, offset)
    spread = ops.row_spread.default(input, group_size)
    widths = ops.split_bits.default(spread, bits)
    codes = ops.quantize_rows.default(
        input, *widths, bits, group_size, seed, offset
    )
    return *codes, *widths


def _follow(link, x, added, parameters, buffers, settings, seed, offset):
    """Overwrite what a convolution returned; returns what is kept."""
    if link.follows is Follows.NOTHING:
        return []
    ops = torch.ops.mmactnn
    if link.follows is Follows.RELU:
        return ops.relu_codes_.default(
            x, link.bits, link.group_size, seed, offset
        )
    if added is not None:
        added = _with_strides(added, x.stride())
    payload = ops.batch_norm_act_.default(
        x,
        added,
        *parameters[2:],
        *buffers,
        link.of_batch,
        *settings,
        link.follows is Follows.NORM_RELU,
        link.bits,
        link.act_bits,
        link.group_size,
        seed,
        offset,
    )
    return payload[: link.kept]


@parts('conv_chain')
@torch.no_grad()
def _conv_chain(
    inputs, parameters, buffers, plan, settings, formats, seed, offset
):
    links = read_links(plan)
    draws = itertools.count(offset)
    codes, kept, outputs = [[] for _ in inputs], [], []
    layouts = [number for input in inputs for number in _layout(input)]
    for link in links:
        if is_input(link.source):
            n = ~link.source
            kind, *format = formats[3 * n : 3 * n + 3]
            if kind != Kept.NOTHING and not codes[n]:
                codes[n] = _encode(inputs[n], kind, *format, seed, next(draws))
        first = link.layer * PARAMETERS
        own = parameters[first : first + PARAMETERS]
        x = torch.ops.aten.convolution.default(
            _read(link.source, inputs, outputs),
            *own[:2],
            link.stride,
            link.padding,
            link.dilation,
            False,
            (0,) * len(link.stride),
            link.groups,
        )
        layouts += _layout(x)
        kept += _follow(
            link,
            x,
            None if link.added is None else _read(link.added, inputs, outputs),
            own,
            buffers[link.layer * _BUFFERS : (link.layer + 1) * _BUFFERS],
            settings[2 * link.layer : 2 * link.layer + 2],
            seed,
            0 if link.follows is Follows.NOTHING else next(draws),
        )
        outputs.append(x)
    read = {s for link in links for s in (link.source, link.added)}
    return (
        [x for i, x in enumerate(outputs) if i not in read],
        [tensor for of_input in codes for tensor in of_input],
        kept,
        torch.stack(
            [torch.scalar_tensor(n, dtype=torch.int64) for n in layouts]
        ),
    )


def _accumulate(sums, index, part, wide):
    total = sums[index]
    if total is None:
        sums[index] = part
        return
    if wide:
        total = total.float()
    sums[index] = torch.sub(total, part, alpha=-1)


class _FakeGradients:
    """Gradients of :func:`conv_chain`, without their values."""

    def __init__(self, links, layouts, parameters, needs, needs_inputs, wide):
        self.links, self.layouts = links, layouts
        self.parameters, self.needs = parameters, needs
        self.needs_inputs, self.wide = needs_inputs, wide
        self.inputs = [None] * len(needs_inputs)
        self.of_links = [None] * len(links)
        self.of_parameters = [None] * len(parameters)
        self.wanted = []
        for link in links:
            self.wanted.append(
                self._wants(link.source)
                or (link.added is not None and self._wants(link.added))
                or any(self._needs(link))
            )

    def _wants(self, source):
        if is_input(source):
            return bool(self.needs_inputs[~source])
        return self.wanted[source]

    def _needs(self, link):
        first = link.layer * PARAMETERS
        return self.needs[first : first + PARAMETERS]

    def _layout_of(self, source):
        offset = 0 if is_input(source) else len(self.inputs)
        return self.layouts[(~source if is_input(source) else source) + offset]

    def _add(self, source, grad):
        if is_input(source):
            _accumulate(self.inputs, ~source, grad, self.wide)
        else:
            _accumulate(self.of_links, source, grad, False)

    def undo(self, i, dtype):
        """Undo a link whose output has a gradient.

        Returns:
            Tensor, optional: The gradient of what its convolution returned,
            if that of anything before it is wanted.
        """
        link, grad = self.links[i], self.of_links[i]
        needs, first = self._needs(link), link.layer * PARAMETERS
        needs_x = self._wants(link.source)
        if link.follows is not Follows.NOTHING:
            grad = grad.new_empty_strided(*self._layout_of(i))
        if link.follows not in (Follows.NOTHING, Follows.RELU):
            for k in (2, 3):
                if needs[k]:
                    vector = grad.new_empty(
                        grad.shape[1:2], dtype=torch.float32
                    )
                    _accumulate(self.of_parameters, first + k, vector, True)
            if link.added is not None and self._wants(link.added):
                self._add(link.added, torch.empty_like(grad))
        if not (needs_x or needs[0] or needs[1]):
            return None
        weight = self.parameters[first]
        x = grad.new_empty_strided(*self._layout_of(link.source), dtype=dtype)
        grads = torch.ops.aten.convolution_backward.default(
            grad,
            x,
            weight,
            (grad.shape[1],),
            link.stride,
            link.padding,
            link.dilation,
            False,
            (0,) * len(link.stride),
            link.groups,
            (needs_x, bool(needs[0]), bool(needs[1])),
        )
        if needs_x:
            self._add(link.source, grads[0])
        for k in (0, 1):
            if needs[k]:
                _accumulate(self.of_parameters, first + k, grads[1 + k], True)
        return grad


@fake('conv_chain_backward')
def _fake_conv_chain_backward(
    grad_outputs,
    codes,
    formats,
    parameters,
    kept,
    layouts,
    plan,
    needs,
    needs_inputs,
    wide,
    observed,
    dtype,
):
    links = read_links(plan)
    grads = _FakeGradients(
        links, _read_layouts(layouts), parameters, needs, needs_inputs, wide
    )
    read = {s for link in links for s in (link.source, link.added)}
    ends = [i for i in range(len(links)) if i not in read]
    for i, grad in zip(ends, grad_outputs):
        grads.of_links[i] = grad
    first = None
    for i in reversed(range(len(links))):
        if grads.of_links[i] is None or not grads.wanted[i]:
            continue
        grad = grads.undo(i, dtype)
        if observed and i == 0 and grad is not None:
            first = torch.empty_like(grad)
    return [*grads.inputs, first, *grads.of_parameters]
