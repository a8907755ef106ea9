"""Places of a forward pass that run fused."""

from ..layers.norm import Fusing
from ..ops.layout import with_strides
from .eligibility import (
    can_fuse_norm,
    can_skip_relu,
    is_output_private,
    is_watched,
)


class Site:
    """Calls of a trace that one call stands for.

    Subclasses are what patterns return, see
    :func:`mmactnn.registry.register_pattern`.

    Args:
        nodes (Sequence[fx.Node]): The calls, in their order. Only the value
            of the last one is read outside of them.
        inputs (Sequence[fx.Node]): Values that the site reads.
        members (Sequence[str | None]): Qualified names of the layers that
            take part, for :meth:`run`; None stands for one that is not there.

    Attributes:
        norms (tuple[str]): Names of the normalisations that keep codes of
            the normalised value.
        relus (tuple[str]): Names of the ReLUs that keep codes of their
            output.
        adds (bool): Whether the second input is added, so that it is a
            shortcut.
        runs_frozen (bool): Whether :meth:`run_frozen` can run.
        pattern (str, optional): Name of the pattern that found it.
    """

    norms = ()
    relus = ()
    adds = False
    runs_frozen = False
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

    def take(self, layers, inputs, frozen):
        """Compute the value of the last node, of inputs that may be let go.

        Args:
            layers (Sequence[nn.Module | None]): The members.
            inputs (list[Tensor[*]]): Values of :attr:`inputs`. What is taken
                from the list is held no longer than it is needed.
            frozen (bool): Whether the block is not trained.

        Returns:
            Tensor[*]: The value.
        """
        run = self.run_frozen if frozen else self.run
        return run(layers, *inputs)

    def run_frozen(self, layers, *inputs):
        """Compute it in a block that takes part in training untrained.

        Args:
            layers (Sequence[nn.Module | None]): The members.
            *inputs (Tensor[*]): Values of :attr:`inputs`; no gradient.

        Returns:
            Tensor[*]: The value.
        """
        raise NotImplementedError


class ConvNormAct(Site):
    """A convolution, normalisation, addition and ReLU, as far as there.

    Args:
        nodes (Sequence[fx.Node]): See :class:`Site`.
        source (fx.Node): Input of the convolution, or of the normalisation
            where there is no convolution.
        added (fx.Node, optional): Value added before the ReLU.
        conv (str, optional): Name of the convolution ...
        norm (str, optional): ... of the normalisation ...
        act (str, optional): ... and of the ReLU; None if a function
            rectifies.
        rectifies (bool): Whether the output is rectified.
        passed (Sequence[str]): Names of ``nn.Identity`` between them.
        add (Callable, optional): The addition by itself, of the normalised
            value and the added one, in place or not as it was.
        relu (Callable, optional): The function that rectifies.
    """

    def __init__(
        self,
        nodes,
        source,
        added,
        conv,
        norm,
        act,
        rectifies,
        passed=(),
        add=None,
        relu=None,
    ):
        inputs = (source,) if added is None else (source, added)
        super().__init__(nodes, inputs, (conv, norm, act, *passed))
        self.rectifies = rectifies
        self._add, self._relu = add, relu
        self.has_conv = conv is not None
        self.adds = added is not None
        self.norms = () if norm is None else (norm,)
        self.relus = (act,) if norm is None else ()

    @property
    def is_chainable(self):
        """bool: Whether a chain can run it, as far as its form goes."""
        has_act = self.members[2] is not None
        return self.has_conv and self.rectifies == has_act

    runs_frozen = True

    def take(self, layers, inputs, frozen):
        """See the base class."""
        conv, norm, act, *_ = layers
        added = inputs.pop() if len(inputs) > 1 else None
        # Not the input: the convolution's output follows in its place.
        output = inputs.pop() if conv is None else conv(inputs.pop())
        if norm is None:
            return act(output)
        if not _may_join(layers):
            return self._finish(layers, output, added)
        private = conv is not None and is_output_private(conv)
        if not frozen and norm.fuses(output, added):
            fusing = Fusing(self.rectifies, private)
            return norm.norm_act(output, fusing, added)
        if private and _runs_frozen(norm, output, added):
            if added is not None:
                added = with_strides(added, output.stride())
            norm.frozen_act_(output, self.rectifies, added)
            return output
        return self._finish(layers, output, added)

    def _finish(self, layers, output, added):
        _, norm, act, *passed = layers
        output = norm(output)
        for layer in passed:
            output = layer(output)
        if added is not None:
            output = self._add(output, added)
        if not self.rectifies:
            return output
        return self._relu(output) if act is None else act(output)


def _may_join(layers):
    """Whether nobody would notice that layers did not run by themselves."""
    _, norm, act, *passed = layers
    return (
        can_fuse_norm(norm)
        and (act is None or can_skip_relu(act))
        and not any(map(is_watched, passed))
    )


def _runs_frozen(norm, output, added):
    return norm.is_frozen(output) and (
        added is None
        or (added.shape == output.shape and added.dtype == output.dtype)
    )
