"""Convolutions, each with the normalisation and ReLU behind it, as one.

What a layer costs on the host, small tensors feel: a node of the graph, a call
of a module and of a function. A chain has one node for all of its layers.
"""

from typing import NamedTuple

from torch.autograd import Function

from .. import ops
from ..payload import share
from .conv import convolution_gradients, convolve
from .double_backward import first_order_only
from .norm_act import NormActRecord, norm_act_gradients, normalise
from .relu import rectified_gradient, rectify

# Weight and bias of the convolution, weight and bias of the normalisation.
_PARAMETERS = 4


class Link(NamedTuple):
    """A convolution and what follows it.

    Attributes:
        parameters (tuple[Tensor | None]): Weight and bias of the convolution,
            weight and bias of the normalisation.
        geometry (tuple): See :func:`mmactnn.autograd.convolution`.
        conv (LayerQuantizer): Settings of the convolution.
        norm (LayerQuantizer, optional): Settings of the normalisation; None
            if there is none.
        settings (NormSettings, optional): Where it gets mean and variance
            from.
        group (ProcessGroup, optional): Processes whose parts make up the
            batch.
        relu (bool): Whether a ReLU follows.
        mask (LayerQuantizer, optional): Settings of that ReLU, if it does not
            follow a normalisation.
    """

    parameters: tuple
    geometry: tuple
    conv: object
    norm: object
    settings: ops.NormSettings | None
    group: object
    relu: bool
    mask: object


class _Record(NamedTuple):
    """What the backward pass of a link knows besides tensors.

    Attributes:
        conv (ConvRecord): Of the convolution.
        act (NormActRecord | tuple[int]): Of the normalisation; without one
            the strides of what was rectified.
        places (tuple[int]): Where its tensors begin among those saved, where
            those of the convolution end, and where all end.
    """

    conv: object
    act: object
    places: tuple


class _Chain(Function):
    @staticmethod
    def forward(ctx, input, residual, dtype, links, made, *parameters):
        needs_parameters = ctx.needs_input_grad[-len(parameters) :]
        saved, records = [], []
        output, payload, first = input, None, 0
        for link in links:
            weight, bias, scale, shift = parameters[
                first : first + _PARAMETERS
            ]
            begin = len(saved)
            output, conv, kept = convolve(
                output,
                weight,
                bias,
                dtype,
                link.geometry,
                link.conv,
                needs_parameters[first],
                payload,
            )
            first += _PARAMETERS
            saved += weight, *kept
            middle = len(saved)
            if link.norm is None:
                output, mask = rectify(output, overwrite=True)
                link.mask.note(kept=(mask,), exact=(output,))
                act, payload = output.stride(), None
                saved.append(mask)
            else:
                output, act, kept, payload = normalise(
                    output,
                    residual if link is links[-1] else None,
                    scale,
                    shift,
                    link.settings,
                    link.group,
                    link.relu,
                    True,
                    link.norm,
                )
                saved += scale, *kept
            records.append(_Record(conv, act, (begin, middle, len(saved))))
        if payload is not None:
            made.append(payload)
        ctx.records = records
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    @first_order_only('A block that is fused')
    def backward(ctx, grad_output):
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        grads = [None] * len(needs)
        grad, end = grad_output, len(needs)
        for conv, act, (begin, middle, stop) in reversed(ctx.records):
            first = end - _PARAMETERS
            # A gradient is wanted if that of anything before it is.
            before = needs[0] or any(
                needs[-_PARAMETERS * len(ctx.records) : first]
            )
            needs_conv = before, needs[first], needs[first + 1]
            if isinstance(act, NormActRecord):
                scale, *kept = saved[middle:stop]
                grad, residual, *grads[first + 2 : end] = norm_act_gradients(
                    act, scale, kept, grad, any(needs_conv)
                )
                if residual is not None:
                    grads[1] = residual
            else:
                grad = rectified_gradient(grad, saved[middle], act)
            if not any(needs_conv):
                grad = None
                break
            weight, *kept = saved[begin:middle]
            grad, *grads[first : first + 2] = convolution_gradients(
                conv, weight, kept, grad, needs_conv
            )
            end = first
        grads[0] = grad
        return tuple(
            [grad if need else None for grad, need in zip(grads, needs)]
        )


def chain(input, residual, dtype, links):
    """Convolutions, normalisations and ReLUs, one behind another.

    The output and all gradients are those of :func:`convolution`,
    :func:`norm_act` and :func:`relu`, called one by one, but that the
    gradient of the output lives until the backward pass of the last layer has
    ended.

    Args:
        input (Tensor[N, C, *]): float32, float16 or bfloat16; under autocast
            it is cast to autocast's dtype.
        residual (Tensor[N, O, *], optional): Added after the last
            normalisation, of the dtype and shape of the output; with ReLU
            only.
        dtype (torch.dtype, optional): That of autocast, see
            :func:`mmactnn.autograd.autocast.lower_dtype`.
        links (Sequence[Link]): The layers.

    Returns:
        Tensor[N, O, *]: The output.
    """
    made = []
    output = _Chain.apply(
        input,
        residual,
        dtype,
        links,
        made,
        *[tensor for link in links for tensor in link.parameters],
    )
    for payload in made:
        share(output, payload)
    return output
