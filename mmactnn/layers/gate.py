"""The compressed product with a gate."""

from torch import nn

from ..autograd import gate as gate_input
from ..registry import register_layer
from .base import CodedLayer
from .gateway import run


class Gate(nn.Module):
    """``input * gate`` as a layer, which torch does not have."""

    def forward(self, input, gate):
        """Multiply.

        Args:
            input (Tensor[N, *]): Tensor to gate.
            gate (Tensor[*]): Factors, in a shape that broadcasts to the
                input's.

        Returns:
            Tensor[N, *]: The product.
        """
        return input * gate


@register_layer(
    Gate,
    # Both layers keep the gate itself exactly.
    saved_by_torch=lambda call: (call.input if call.needs_weight else None,),
)
class QGate(CodedLayer, Gate):
    """``Gate`` that keeps its input as codes of a few bits.

    The output and the gradient of the input are exact; that of the gate is
    linear in the input and so unbiased. In eval mode, without grad and at
    level L0 it is ``Gate``.

    Args:
        bits (int, optional): Bits an element of the kept input at every level
            but L0. Valid values are 1 to 8. Defaults to the level's
            for convolutions, rounded down.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to the model's, which is 256
            unless the conversion says otherwise.

    Examples:
        >>> x = torch.randn(2, 8, 4, 4, requires_grad=True)
        >>> QGate()(x, x.mean((2, 3), keepdim=True)).sum().backward()
    """

    kind = 'conv'
    shares_bits = False

    def forward(self, input, gate):
        """See ``Gate``."""
        return run(self, Gate.forward, QGate._compress, (input, gate), (gate,))

    def _compress(self, input, gate):
        if input.dim() == 0:
            return Gate.forward(self, input, gate)
        return gate_input(input, gate, self.quantizer)
