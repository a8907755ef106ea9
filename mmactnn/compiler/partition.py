"""Partitioner of AOTAutograd's joint graph that keeps values as codes."""

import time
from pathlib import Path

from ..ops.quantize import DEFAULT_GROUP_SIZE
from .attention import find_replays
from .classes import CASTS, table_of_linear_uses
from .cut import Cut
from .demands import Role, find_demands, find_quadratic
from .extract import extract, partitioners, tidy
from .joint import Joint, through
from .noise import allocate
from .report import GraphReport, describe
from .rewrite import Rewriter
from .values import hint, memory_order, value

# Smaller values are kept as they are.
_MIN_BYTES = 4096
# Rows from which on means of channels are little beside the codes.
_MIN_ROWS_FOR_MEANS = 64
_MAX_SOLUTIONS = 8
# Channels of an image.
_MAX_IMAGE = 4


class Partitioner:
    """Partitioner for one level.

    Args:
        compression (Compression): Settings of the level.
        report (CompileReport): Gets an entry for each graph.
    """

    def __init__(self, compression, report):
        self.compression = compression
        self.report = report

    def __call__(
        self,
        module,
        joint_inputs,
        *,
        num_fwd_outputs,
        static_lifetime_input_indices=None,
        **others,
    ):
        """Split a joint graph.

        Args:
            module (fx.GraphModule): The joint graph; changed.
            joint_inputs (object): Not used.
            num_fwd_outputs (int): Number of outputs of the forward pass.
            static_lifetime_input_indices (Sequence[int], optional):
                Positions of parameters and buffers. Defaults to none.
            **others: For torch's partitioner, which splits graphs without a
                gradient.

        Returns:
            tuple[fx.GraphModule, fx.GraphModule]: Forward and backward.
        """
        start = time.perf_counter()
        static = list(static_lifetime_input_indices or ())
        module = tidy(module)
        joint = Joint(module, num_fwd_outputs, static, _MIN_BYTES)
        if not joint.has_backward:
            return partitioners().min_cut_rematerialization_partition(
                module,
                joint_inputs,
                num_fwd_outputs=num_fwd_outputs,
                static_lifetime_input_indices=static,
                **others,
            )
        cut, demands, uses = self._solve(joint)
        roles = {n: _roles(n, served) for n, served in uses.items() if served}
        bits = {n: max(map(self.bits_of, found)) for n, found in roles.items()}
        if self.compression.adaptive:
            bits = allocate(joint.graph, roles, bits)
        centred = {node for node in bits if self._is_centred(node, uses[node])}
        rewriter = Rewriter(cut, bits, centred, self.compression.rounding)
        rewriter.rewrite(demands)
        kept = set(cut.exact)
        for payload in rewriter.payloads.values():
            kept.update(payload.kept)
            kept.update(payload.shared)
        forward, backward, tensors = extract(
            module, kept, num_fwd_outputs, static
        )
        self.report.graphs.append(
            GraphReport(
                describe(cut, rewriter.payloads, bits, uses, tensors),
                cut.copies,
                time.perf_counter() - start,
            )
        )
        return forward, backward

    def bits_of(self, role):
        """Bits of a role at the level.

        Args:
            role (Role): The role.

        Returns:
            int, optional: None keeps values exactly.
        """
        compression = self.compression
        bits = getattr(compression, role.value)
        if role is Role.ATTENTION_VALUE:
            if compression.attention is None:
                return None
            bits = compression.attention if bits is None else bits
        if role is Role.INPUT and bits is None:
            bits = compression.linear_ops
        return None if bits is None else int(bits)

    def _solve(self, joint):
        """Cut until no gradient is quadratic in codes."""
        replays = find_replays(joint)
        demands = find_demands(joint, replays, self.bits_of)
        forced = set()
        for _ in range(_MAX_SOLUTIONS):
            cut = Cut(joint, demands, replays, self.bits_of, forced)
            uses = cut.uses_of_payloads(demands)
            biased = find_quadratic(joint, uses)
            if not biased:
                return cut, demands, uses
            forced |= biased
            # What reads them exactly is exact, too.
            forced |= {
                d.node for n in biased for d in uses[n] if d.role is not None
            }
        raise RuntimeError(
            f'the gradient stayed quadratic in {len(biased)} values after '
            f'{_MAX_SOLUTIONS} cuts: please report the model'
        )

    def _is_centred(self, node, demands):
        """Whether means of channels are kept apart."""
        roles = {d.role for d in demands}
        wanted = {Role.NORM, Role.ATTENTION}
        if self.compression.channel_means:
            wanted.add(Role.WEIGHT)
        tensor = value(node)
        channels = tensor.dim() - 1
        sizes = [hint(size) for size in tensor.shape]
        return (
            bool(roles & wanted)
            and tensor.dim() >= 2
            and memory_order(tensor)[-1] == channels
            and sizes[channels] >= DEFAULT_GROUP_SIZE // 8
            and min(sizes) > 0
            and _rows(sizes) >= _MIN_ROWS_FOR_MEANS
        )


def _roles(node, demands):
    """Roles of a payload: of its uses, and that of an image."""
    roles = {d.role for d in demands}
    tensor = value(node)
    source = through(node, CASTS)
    is_image = (
        source.op == 'placeholder'
        and tensor.dim() == 4
        and (hint(tensor.shape[1]) or _MAX_IMAGE + 1) <= _MAX_IMAGE
    )
    return roles | {Role.INPUT} if is_image else roles


def _rows(sizes):
    rows = 1
    for size in sizes[:-1]:
        rows *= size
    return rows


def key_of(compression):
    """Key of a partitioner for caches: its source, settings and table.

    Args:
        compression (Compression): The settings.

    Returns:
        str: Equal for equal results.
    """
    from torch._inductor.custom_graph_pass import get_hash_for_files

    files = sorted(Path(__file__).parent.glob('*.py'))
    source = get_hash_for_files(tuple(map(str, files)))
    return f'{source.hex()} {compression!r} {table_of_linear_uses()!r}'
