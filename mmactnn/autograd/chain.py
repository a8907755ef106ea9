"""Convolutions, each with the normalisation and ReLU behind it, as one.

What a layer costs on the host, small tensors feel: a node of the graph, a call
of a module and of a function. A chain has one node for all of its layers.
"""

from typing import NamedTuple

from torch.autograd import Function

from .. import ops
from ..payload import share
from .autocast import lower_dtype
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


class _Saved:
    """Tensors to save, each of them once however many layers want it."""

    def __init__(self):
        self.tensors = []
        self._places = {}

    def add(self, tensors):
        """Places of tensors among those to save."""
        places = []
        for tensor in tensors:
            place = self._places.setdefault(id(tensor), len(self.tensors))
            if place == len(self.tensors):
                self.tensors.append(tensor)
            places.append(place)
        return places


class _Chain(Function):
    @staticmethod
    def forward(ctx, input, residual, dtype, links, made, *parameters):
        needs = ctx.needs_input_grad
        needs_parameters = needs[len(needs) - len(parameters) :]
        saved, records = _Saved(), []
        output, payload, needs_output = input, None, needs[0]
        for i, link in enumerate(links):
            weight, bias, scale, shift = parameters[_PARAMETERS * i :][:4]
            needs_link = needs_parameters[_PARAMETERS * i :][:4]
            needs_conv = needs_output, *needs_link[:2]
            needs_norm = any(needs_conv)
            needs_output = needs_norm or any(needs_link)
            output, conv, kept = convolve(
                output,
                weight,
                bias,
                dtype,
                link.geometry,
                link.conv,
                needs_conv[1],
                payload,
            )
            of_conv = conv, saved.add((weight, *kept)), needs_conv
            if link.norm is None:
                output, mask = rectify(output, overwrite=True)
                link.mask.note(kept=(mask,), exact=(output,))
                act, payload, kept = output.stride(), None, (mask,)
            else:
                output, act, kept, payload = normalise(
                    output,
                    residual if i == len(links) - 1 else None,
                    scale,
                    shift,
                    link.settings,
                    link.group,
                    link.relu,
                    True,
                    link.norm,
                )
                kept = scale, *kept
            of_act = act, saved.add(kept), needs_norm
            records.append((of_conv, of_act))
        if payload is not None:
            made.append(payload)
        ctx.records = records
        ctx.save_for_backward(*saved.tensors)
        return output

    @staticmethod
    @first_order_only('A block that is fused')
    def backward(ctx, grad_output):
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        grad = grad_output
        grads = [None] * len(needs)
        end = len(needs)
        for of_conv, of_act in reversed(ctx.records):
            act, places, needs_norm = of_act
            kept = [saved[place] for place in places]
            if isinstance(act, NormActRecord):
                grad, residual, *grads[end - 2 : end] = norm_act_gradients(
                    act, kept[0], kept[1:], grad, needs_norm
                )
                grads[1] = residual if grads[1] is None else grads[1]
            else:
                grad = rectified_gradient(grad, *kept, act)
            conv, places, needs_conv = of_conv
            if not any(needs_conv):
                grad = None
                break
            weight, *kept = [saved[place] for place in places]
            grad, *grads[end - 4 : end - 2] = convolution_gradients(
                conv, weight, kept, grad, needs_conv
            )
            end -= _PARAMETERS
        grads[0] = grad
        return tuple(
            grad if needed else None for grad, needed in zip(grads, needs)
        )


def chain(input, residual, links):
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
        links (Sequence[Link]): The layers.

    Returns:
        Tensor[N, O, *]: The output.
    """
    made = []
    output = _Chain.apply(
        input,
        residual,
        lower_dtype(input),
        links,
        made,
        *[tensor for link in links for tensor in link.parameters],
    )
    for payload in made:
        share(output, payload)
    return output
