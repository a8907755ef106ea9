"""The partitioner as Inductor and AOTAutograd take it."""

from .extract import inductor_base, partitioners
from .partition import Partitioner, key_of
from .report import CompileReport

CustomPartitionerFn = inductor_base()


class InductorPartitioner(CustomPartitionerFn):
    """Partitioner as Inductor's option ``custom_partitioner_fn``.

    Args:
        compression (Compression): Settings of the level.

    Attributes:
        report (CompileReport): On the graphs compiled so far.

    Raises:
        RuntimeError: If this version of torch lacks what is needed.
    """

    def __init__(self, compression):
        partitioners()
        self._compression = compression
        self.report = CompileReport()

    def __call__(self, module, joint_inputs, **kwargs):
        """See :class:`Partitioner`."""
        partition = Partitioner(self._compression, self.report)
        return partition(module, joint_inputs, **kwargs)

    def uuid(self):
        """str: Key for the compiler's cache."""
        return key_of(self._compression)

    def __deepcopy__(self, memo):
        """Itself: configs are copied, and the report is the caller's."""
        return self

    def __reduce__(self):
        """Without the report, so that keys of caches do not depend on it."""
        return type(self), (self._compression,)


class AotEager:
    """Backend that runs the two passes by torch's kernels, one by one.

    ``'aot_eager'`` itself does not read Inductor's option.

    Args:
        compression (Compression): Settings of the level.

    Attributes:
        report (CompileReport): On the graphs compiled so far.

    Raises:
        RuntimeError: If this version of torch lacks what is needed.
    """

    def __init__(self, compression):
        partitioners()
        self.report = CompileReport()
        self._partition = Partitioner(compression, self.report)

    def __call__(self, module, inputs, **kwargs):
        """Compile a graph of Dynamo.

        Args:
            module (fx.GraphModule): The graph.
            inputs (Sequence[object]): Its inputs.
            **kwargs: None are known.

        Returns:
            Callable: The compiled function.
        """
        # Decompositions of pooling read it as an attribute of its package.
        import torch._inductor.lowering  # noqa: F401
        from torch._dynamo.backends.common import aot_autograd
        from torch._inductor.decomposition import select_decomp_table

        backend = aot_autograd(
            fw_compiler=_run_by_nodes,
            partition_fn=self._partition,
            decompositions=select_decomp_table,
        )
        return backend(module, inputs, **kwargs)


def _run_by_nodes(module, inputs):
    from functorch.compile import make_boxed_func

    return make_boxed_func(module.forward)
