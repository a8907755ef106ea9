"""Decomposition and fake kernel of the chain ops.

A traced graph cannot hold an op that both writes to its arguments and returns
lists, so the forward pass decomposes into single ops. The backward pass only
needs the shapes of its results.
"""

import itertools

import torch

from ._fake import decomposition, fake
from .conv_chain import (
    PARAMETERS,
    ChainStep,
    Epilogue,
    PayloadKind,
    find_outputs,
    is_input,
)

_BUFFERS = 3


def read_steps(numbers):
    """Read the steps back from a plan.

    Args:
        numbers (Sequence[int]): Field of :class:`ChainPlan`.

    Returns:
        list[ChainStep]: The steps.
    """
    steps, left = [], iter(numbers)

    def take(count):
        return tuple(itertools.islice(left, count))

    for source in left:
        residual = next(left) if next(left) else None
        layer, dims = take(2)
        window = take(dims), take(dims), take(dims)
        groups, epilogue, use_batch_stats = take(3)
        steps.append(
            ChainStep(
                source,
                residual,
                layer,
                *window,
                groups,
                Epilogue(epilogue),
                bool(use_batch_stats),
                *take(3),
            )
        )
    return steps


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


def _encode(input, kind, bits, group_size, seed, offset, rotated):
    ops = torch.ops.mmactnn
    if kind == PayloadKind.PLAIN:
        return ops.quantize.default(
            input, bits, group_size, seed, offset, None, rotated
        )
    energies = ops.sample_range_energy.default(input, group_size)
    widths = ops.allocate_sample_bits.default(energies, bits)
    codes = ops.quantize_rows.default(
        input, *widths, bits, group_size, seed, offset, None, rotated
    )
    return *codes, *widths


def _run_epilogue(
    step, x, residual, parameters, buffers, settings, seed, offset, rotated
):
    """Overwrite a convolution's output; returns the tensors to save."""
    if step.epilogue is Epilogue.NONE:
        return []
    ops = torch.ops.mmactnn
    if step.epilogue is Epilogue.RELU:
        return ops.relu_codes_.default(
            x, step.bits, step.group_size, seed, offset, None, rotated
        )
    if residual is not None:
        residual = _with_strides(residual, x.stride())
    payload = ops.batch_norm_act_.default(
        x,
        residual,
        *parameters[2:],
        *buffers,
        step.use_batch_stats,
        *settings,
        step.epilogue is Epilogue.NORM_RELU,
        step.bits,
        step.act_bits,
        step.group_size,
        seed,
        offset,
        None,
        rotated,
    )
    return payload[: step.num_saved]


@decomposition('conv_chain')
@torch.no_grad()
def _conv_chain(
    inputs,
    parameters,
    buffers,
    plan,
    settings,
    formats,
    seed,
    offset,
    rotated=False,
):
    steps = read_steps(plan)
    draws = itertools.count(offset)
    codes, kept, outputs = [[] for _ in inputs], [], []
    layouts = [number for input in inputs for number in _layout(input)]
    for step in steps:
        if is_input(step.source):
            n = ~step.source
            kind, *format = formats[3 * n : 3 * n + 3]
            if kind != PayloadKind.NONE and not codes[n]:
                codes[n] = _encode(
                    inputs[n], kind, *format, seed, next(draws), rotated
                )
        first = step.layer * PARAMETERS
        own = parameters[first : first + PARAMETERS]
        x = torch.ops.aten.convolution.default(
            _read(step.source, inputs, outputs),
            *own[:2],
            *step.conv_arguments,
        )
        layouts += _layout(x)
        kept += _run_epilogue(
            step,
            x,
            None
            if step.residual is None
            else _read(step.residual, inputs, outputs),
            own,
            buffers[step.layer * _BUFFERS : (step.layer + 1) * _BUFFERS],
            settings[2 * step.layer : 2 * step.layer + 2],
            seed,
            0 if step.epilogue is Epilogue.NONE else next(draws),
            rotated,
        )
        outputs.append(x)
    return (
        [outputs[i] for i in find_outputs(steps)],
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
    """Gradients of :func:`conv_chain` as fake tensors, and their sums."""

    def __init__(self, steps, layouts, parameters, needs, needs_inputs, wide):
        self.steps, self.layouts = steps, layouts
        self.parameters, self.needs = parameters, needs
        self.needs_inputs, self.wide = needs_inputs, wide
        self.inputs = [None] * len(needs_inputs)
        self.of_steps = [None] * len(steps)
        self.of_parameters = [None] * len(parameters)
        self.wanted = []
        for step in steps:
            self.wanted.append(
                self._wants(step.source)
                or (step.residual is not None and self._wants(step.residual))
                or any(self._needs(step))
            )

    def _wants(self, source):
        if is_input(source):
            return bool(self.needs_inputs[~source])
        return self.wanted[source]

    def _needs(self, step):
        first = step.layer * PARAMETERS
        return self.needs[first : first + PARAMETERS]

    def _layout_of(self, source):
        offset = 0 if is_input(source) else len(self.inputs)
        return self.layouts[(~source if is_input(source) else source) + offset]

    def _add(self, source, grad):
        if is_input(source):
            _accumulate(self.inputs, ~source, grad, self.wide)
        else:
            _accumulate(self.of_steps, source, grad, False)

    def undo(self, i, dtype):
        """Backward pass of a step whose output has a gradient.

        Args:
            i (int): Index of the step.
            dtype (torch.dtype): Dtype of the chain's inputs.

        Returns:
            Tensor, optional: Gradient of its convolution's output; None if
            neither the convolution nor its input wants one.
        """
        step, grad = self.steps[i], self.of_steps[i]
        needs, first = self._needs(step), step.layer * PARAMETERS
        needs_x = self._wants(step.source)
        if step.epilogue is not Epilogue.NONE:
            grad = grad.new_empty_strided(*self._layout_of(i))
        if step.has_norm:
            for k in (2, 3):
                if needs[k]:
                    vector = grad.new_empty(
                        grad.shape[1:2], dtype=torch.float32
                    )
                    _accumulate(self.of_parameters, first + k, vector, True)
            if step.residual is not None and self._wants(step.residual):
                self._add(step.residual, torch.empty_like(grad))
        if not (needs_x or needs[0] or needs[1]):
            return None
        weight = self.parameters[first]
        x = grad.new_empty_strided(*self._layout_of(step.source), dtype=dtype)
        grads = torch.ops.aten.convolution_backward.default(
            grad,
            x,
            weight,
            (grad.shape[1],),
            *step.conv_arguments,
            (needs_x, bool(needs[0]), bool(needs[1])),
        )
        if needs_x:
            self._add(step.source, grads[0])
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
    draws=(),
):
    steps = read_steps(plan)
    grads = _FakeGradients(
        steps, _read_layouts(layouts), parameters, needs, needs_inputs, wide
    )
    for i, grad in zip(find_outputs(steps), grad_outputs):
        grads.of_steps[i] = grad
    first = None
    for i in reversed(range(len(steps))):
        if grads.of_steps[i] is None or not grads.wanted[i]:
            continue
        grad = grads.undo(i, dtype)
        if observed and i == 0 and grad is not None:
            first = torch.empty_like(grad)
    return [*grads.inputs, first, *grads.of_parameters]
