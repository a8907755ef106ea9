"""Helpers for tests of layers: twins, bitwise equality, counters."""

import contextlib
import copy

import torch

from mmactnn import convert_model
from mmactnn.codes.quantizer import LayerQuantizer
from mmactnn.ops.rotation import SQUARED_ERRORS, rotates

# Relative error of exact results: that of float32 itself,
# with fast convolutions, and far below that of codes.
FLOAT32_ERROR = 1e-5

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextlib.contextmanager
def exact_numerics():
    """Make CUDA repeatable and let it multiply in full float32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (
        matmul.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    matmul.allow_tf32 = False
    # This also fills new tensors with NaN, so that a value which must not
    # matter, but does, shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        matmul.allow_tf32 = before[0]
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])


def assert_same_bits(actual, expected):
    """Equal down to the sign of zero; NaN equals itself.

    Args:
        actual (Tensor[*], optional): What came out.
        expected (Tensor[*], optional): What should have.
    """
    if expected is None:
        assert actual is None
        return
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    integer = _INTEGERS[actual.element_size()]
    a, b = (
        _one_nan(t.detach().contiguous()).view(integer)
        for t in (actual, expected)
    )
    different = int((a != b).sum())
    assert not different, f'{different} of {a.numel()} elements differ'


def _one_nan(tensor):
    """With one bit pattern for all NaN; which it is says nothing."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.masked_fill(tensor.isnan(), float('nan'))


def exact_twin(layer):
    """A torch layer with a copy of a compressed layer's parameters.

    Args:
        layer (QuantizedLayer): The layer to copy.

    Returns:
        nn.Module: Of the torch parent's class itself.
    """
    twin = copy.deepcopy(layer)
    twin.revert_()
    assert type(twin).__module__.startswith('torch.nn.')
    return twin


def at_level(layer, level):
    """The layer itself, at a level.

    Args:
        layer (nn.Module): Converted in place.
        level (str): Level.

    Returns:
        nn.Module: ``layer``.
    """
    convert_model(layer, level)
    return layer


def gradients(layer, x, grad_output, **call):
    """One forward and backward pass of a layer.

    Args:
        layer (nn.Module): Its parameters' gradients are dropped before.
        x (Tensor[*]): Input; a copy of the same strides gets a gradient.
        grad_output (Tensor[*] | None): Gradient of the output; None for
            that of the sum.
        **call: Further arguments of the layer's call.

    Returns:
        dict[str, Tensor | None]: ``output``, and the gradients of ``input``
        and of the parameters by name.
    """
    layer.zero_grad()
    x = x.detach().requires_grad_()
    output = layer(x, **call)
    if grad_output is None:
        grad_output = torch.ones_like(output)
    output.backward(grad_output)
    found = {name: p.grad for name, p in layer.named_parameters()}
    return dict(output=output.detach(), input=x.grad, **found)


def count_packs(monkeypatch):
    """Count the tensors that are quantised from now on.

    Args:
        monkeypatch (pytest.MonkeyPatch): Undoes it after the test.

    Returns:
        list[int]: Grows with every tensor quantised, by its samples; also
        with those that a chain has an op quantise.
    """
    packed = []
    pack, encoding = LayerQuantizer.pack, LayerQuantizer.encoding

    def counting(self, tensor):
        packed.append(len(tensor))
        return pack(self, tensor)

    def counting_encodings(self, samples):
        found = encoding(self, samples)
        if found is not None:
            packed.append(samples)
        return found

    monkeypatch.setattr(LayerQuantizer, 'encoding', counting_encodings)
    monkeypatch.setattr(LayerQuantizer, 'pack', counting)
    return packed


@contextlib.contextmanager
def saved_tensors():
    """Collect what autograd saves inside of the block.

    Yields:
        list[Tensor]: Grows with every tensor saved.
    """
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    # Random bits stay with the formats of payloads, as without hooks.
    pack.keeps_tensors = True
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield saved


def relative_error(actual, expected):
    """Norm of the difference over the norm of what is expected.

    Args:
        actual (Tensor[*]): Any float dtype.
        expected (Tensor[*]): Any float dtype.

    Returns:
        float: The error.
    """
    expected = expected.detach().double().cpu()
    difference = actual.detach().double().cpu() - expected
    return float(difference.norm() / expected.norm())


def rounding_variance(x, payload):
    """Closed form of the variance that rounding gives each element.

    A value a fraction f of a step above the code below it is rounded up with
    probability f: the variance is ``step ** 2 * f * (1 - f)``. With dither it
    is ``step ** 2 / 12``, but where 0 is the smallest value. With a rotation
    it is that of the group's values times ``D / (1 - D)`` for levels of the
    squared error D, if its coefficients are normally distributed.

    Args:
        x (Tensor[N, *]): Contiguous tensor that was quantised.
        payload (QuantizedTensor): Its payload, for format and ranges.

    Returns:
        Tensor[N, *]: float64 variance of each element.
    """
    rows = x.detach().double().flatten(1)
    drawn, bits = payload.format.drawn, payload.format.bits
    if drawn is not None and drawn.rotated and rotates(rows.shape[1], bits):
        groups = rows.view(-1, 256)
        error = SQUARED_ERRORS[bits]
        variance = groups.var(1, correction=0) * (error / (1 - error))
        return variance.repeat_interleave(256).view_as(x)
    low, step = (
        payload.ranges.double()
        .repeat_interleave(payload.format.group_size, dim=1)
        .unbind(-1)
    )
    low, step = low[:, : rows.shape[1]], step[:, : rows.shape[1]]
    fraction = ((rows - low) / step).frac()
    shares = fraction * (1 - fraction)
    if drawn is not None:
        shares = shares.where(low == 0, 1 / 12)
    return (step**2 * shares).view_as(x)
