"""Sites: calls of a forward pass that run fused."""

from ..layers.gateway import keeps_codes
from ..layers.norm import Fusing
from ..layers.smooth import KnownFunction
from ..ops.layout import with_strides
from .eligibility import (
    can_fuse_norm,
    can_skip_relu,
    is_instrumented,
    is_output_private,
)


class Site:
    """Base class of the calls of a trace that run as one.

    Patterns return instances of subclasses, see
    :func:`mmactnn.registry.register_pattern`.

    Args:
        nodes (Sequence[fx.Node]): The calls, in their order. Only the value
            of the last one is read outside of them.
        inputs (Sequence[fx.Node]): Values that the site reads.
        members (Sequence[str | None]): Qualified names of the layers that
            take part, for :meth:`run`; None for a layer that is absent, and
            ``''`` for the block itself.

    Attributes:
        norms (tuple[str]): Names of the normalisations that keep codes of
            the normalised value.
        relus (tuple[str]): Names of the ReLUs that keep codes of their
            output.
        adds (bool): Whether the second input is a shortcut, which is added.
        runs_frozen (bool): Whether :meth:`run_frozen` can run.
        draws (bool): Whether it may draw random numbers of torch, and so has
            to keep its place among the calls.
        pattern (str, optional): Name of the pattern that found it.
    """

    norms = ()
    relus = ()
    adds = False
    runs_frozen = False
    draws = False
    pattern = None

    def __init__(self, nodes, inputs, members):
        self.nodes = tuple(nodes)
        self.inputs = tuple(inputs)
        self.members = tuple(members)

    def run(self, layers, *inputs):
        """Compute the value of the last node.

        Args:
            layers (Sequence[nn.Module | None]): The members.
            *inputs (Tensor[*]): Values of :attr:`inputs`.

        Returns:
            Tensor[*]: The value, equal to that of the calls.
        """
        raise NotImplementedError

    def execute(self, layers, inputs, frozen):
        """Compute the value of the last node, and free inputs early.

        Args:
            layers (Sequence[nn.Module | None]): The members.
            inputs (list[Tensor[*]]): Values of :attr:`inputs`. An input that
                is removed from the list is freed after its last use.
            frozen (bool): Whether the block is not trained.

        Returns:
            Tensor[*]: The value.
        """
        run = self.run_frozen if frozen else self.run
        return run(layers, *inputs)

    def run_frozen(self, layers, *inputs):
        """Compute the value in a frozen block of a model in training.

        Args:
            layers (Sequence[nn.Module | None]): The members.
            *inputs (Tensor[*]): Values of :attr:`inputs`; no gradient.

        Returns:
            Tensor[*]: The value.
        """
        raise NotImplementedError


class ConvNormAct(Site):
    """A convolution, normalisation, addition and ReLU; some may be absent.

    Args:
        nodes (Sequence[fx.Node]): See :class:`Site`.
        source (fx.Node): Input of the convolution, or of the normalisation
            where there is no convolution.
        residual (fx.Node, optional): Value that is added before the ReLU.
        conv (str, optional): Name of the convolution.
        norm (str, optional): Name of the normalisation.
        act (str, optional): Name of the ReLU; None if a function rectifies.
        rectifies (bool): Whether the output is rectified.
        identities (Sequence[str]): Names of the ``nn.Identity`` among them.
        add (Callable, optional): The addition of normalised value and
            residual, in place if that of the forward pass is.
        relu (Callable, optional): The function that rectifies.
    """

    def __init__(
        self,
        nodes,
        source,
        residual,
        conv,
        norm,
        act,
        rectifies,
        identities=(),
        add=None,
        relu=None,
    ):
        inputs = (source,) if residual is None else (source, residual)
        super().__init__(nodes, inputs, (conv, norm, act, *identities))
        self.rectifies = rectifies
        self._add, self._relu = add, relu
        self.has_conv = conv is not None
        self.adds = residual is not None
        self.norms = () if norm is None else (norm,)
        self.relus = (act,) if norm is None else ()

    @property
    def is_chainable(self):
        """bool: Whether a chain supports the form of the site."""
        has_act = self.members[2] is not None
        return self.has_conv and self.rectifies == has_act

    runs_frozen = True

    def execute(self, layers, inputs, frozen):
        """See the base class."""
        conv, norm, act, *_ = layers
        residual = inputs.pop() if len(inputs) > 1 else None
        # The input is not held while the convolution's output is alive.
        output = inputs.pop() if conv is None else conv(inputs.pop())
        if norm is None:
            return act(output)
        if not _can_fuse(layers):
            return self._finish(layers, output, residual)
        inplace = conv is not None and is_output_private(conv)
        if not frozen and norm.fuses(output, residual):
            fusing = Fusing(self.rectifies, inplace)
            return norm.norm_act(output, fusing, residual)
        if inplace and _can_run_frozen(norm, output, residual):
            if residual is not None:
                residual = with_strides(residual, output.stride())
            norm.frozen_act_(output, self.rectifies, residual)
            return output
        return self._finish(layers, output, residual)

    def _finish(self, layers, output, residual):
        _, norm, act, *identities = layers
        output = norm(output)
        for layer in identities:
            output = layer(output)
        if residual is not None:
            output = self._add(output, residual)
        if not self.rectifies:
            return output
        return self._relu(output) if act is None else act(output)


class NormSmooth(Site):
    """A convolution, a normalisation and a smooth activation.

    One code of the normalised value serves the backward passes of
    normalisation and activation, and the layers that read the output.

    Args:
        nodes (Sequence[fx.Node]): See :class:`Site`.
        source (fx.Node): Input of the convolution, or of the normalisation
            where there is no convolution.
        conv (str, optional): Name of the convolution.
        norm (str): Name of the normalisation.
        act (str): Name of the activation.
    """

    def __init__(self, nodes, source, conv, norm, act):
        super().__init__(nodes, (source,), (conv, norm, act))
        self.norms = (norm,)

    def execute(self, layers, inputs, frozen):
        """See the base class."""
        conv, norm, act = layers
        # The input is not held while the convolution's output is alive.
        output = inputs.pop() if conv is None else conv(inputs.pop())
        inplace = conv is not None and is_output_private(conv)
        if not can_fuse_norm(norm) or not norm.fuses(output):
            return act(norm(output))
        if (
            isinstance(act, KnownFunction)
            and not is_instrumented(act)
            and keeps_codes(act, output, (norm.weight, norm.bias))
            and act.shares_code
        ):
            return norm.norm_smooth(output, act, inplace)
        return act(norm.norm_act(output, Fusing(False, inplace)))


def _can_fuse(layers):
    """Whether no hook or patch would miss the call of a layer."""
    _, norm, act, *identities = layers
    return (
        can_fuse_norm(norm)
        and (act is None or can_skip_relu(act))
        and not any(map(is_instrumented, identities))
    )


def _can_run_frozen(norm, output, residual):
    return norm.is_frozen(output) and (
        residual is None
        or (residual.shape == output.shape and residual.dtype == output.dtype)
    )
