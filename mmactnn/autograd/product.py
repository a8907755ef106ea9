"""Product of two tensors that keeps large factors as codes."""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import Function

from ..codes.calls import Call
from .double_backward import first_order_only

# A factor with this part of the largest's elements, or less, is kept itself.
_SMALL = 1 / 8


class Bilinear(NamedTuple):
    """A product of two tensors, of any kind: a function linear in each.

    Attributes:
        multiply (Callable): Maps the two factors to the product.
        gradients (tuple[Callable]): For each factor, a function of the
            gradient of the product, the other factor and the shape of the
            gradient that it returns.
    """

    multiply: Callable
    gradients: tuple

    def __call__(self, input, other, quantizer):
        """Multiply, with large factors kept as codes.

        Args:
            input (Tensor[*]): The first factor.
            other (Tensor[*]): The second one.
            quantizer (LayerQuantizer): Settings of the layer.

        Returns:
            Tensor[*]: The product.
        """
        return _Product.apply(input, other, self, quantizer)


def _times(grad_output, factor, shape):
    return (grad_output * factor).sum_to_size(shape)


_ELEMENTWISE = Bilinear(torch.mul, (_times, _times))


class _Product(Function):
    @staticmethod
    def forward(ctx, input, other, kind, quantizer):
        output = kind.multiply(input, other)
        factors = input, other
        size = max(input.numel(), other.numel(), output.numel())
        ctx.gradients = kind.gradients
        needed = ctx.needs_input_grad[1::-1]
        ctx.formats, ctx.counts, kept, codes = [], [], [], []
        for factor, is_needed in zip(factors, needed):
            format, tensors = None, (factor,) if is_needed else ()
            if is_needed and is_coded(factor, size):
                format, tensors, _ = quantizer.keep_shared(
                    factor, factor, needed=True
                )
                codes += tensors
            ctx.formats.append(format)
            ctx.counts.append(len(tensors))
            kept += tensors
        ctx.save_for_backward(*kept)
        ctx.layouts = [(factor.shape, factor.dtype) for factor in factors]
        ctx.source = weakref.ref(input)
        if quantizer.meter is not None:
            # The factors that codes stand for.
            exact = [
                factor if format is not None else None
                for factor, format in zip(factors, ctx.formats)
            ]
            quantizer.record(tuple(codes), Call(exact[0], output, exact[1]))
        return output

    @staticmethod
    @first_order_only(
        'A compressed product', unless=lambda ctx: not any(ctx.formats)
    )
    def backward(ctx, grad_output):
        saved = ctx.saved_tensors
        first = ctx.counts[0]
        kept = saved[:first], saved[first:]
        grads = []
        for i in (0, 1):
            if not ctx.needs_input_grad[i]:
                grads.append(None)
                continue
            (factor, *rest), format = kept[1 - i], ctx.formats[1 - i]
            if format is not None:
                factor = format.payload(factor, *rest).unpack()
            shape, dtype = ctx.layouts[i]
            grad = ctx.gradients[i](grad_output, factor, shape).to(dtype)
            del factor
            grads.append(grad)
        return *grads, None, None


def is_coded(factor, size):
    """Whether a factor of a product is kept as codes.

    Args:
        factor (Tensor[*]): The factor.
        size (int): Elements of the largest of factors and product.

    Returns:
        bool: False for leaves, which are alive anyway, small ones, and those
        that the function keeps that made them, such as softmax.
    """
    return (
        not factor.is_leaf
        and factor.numel() > size * _SMALL
        # Of the class: the attribute of the node would unpack the tensor.
        and not hasattr(type(factor.grad_fn), '_saved_result')
    )


def product(input, other, quantizer):
    """``input * other`` with large factors kept as codes.

    The output is exact. The gradient of a factor is linear in the other one,
    hence unbiased.

    Args:
        input (Tensor[N, *]): float32, float16 or bfloat16.
        other (Tensor[*]): float32, float16 or bfloat16, of a shape that
            broadcasts with the input's.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor[N, *]: The product.
    """
    return _ELEMENTWISE(input, other, quantizer)
