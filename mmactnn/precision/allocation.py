"""Greedy allocation of bits to tensors."""

import heapq

from ..ops import VALID_BITS
from .variance import relative_variance

MIN_BITS, MAX_BITS = VALID_BITS[0], VALID_BITS[-1]


def allocate_bits(costs, sizes, budget, rotated=False):
    """Allocate bits so that the variance of rounding is minimal.

    Minimises ``sum(costs[i] * relative_variance(bits[i]))`` under
    ``sum(sizes[i] * bits[i]) <= budget`` greedily: the next bit goes where
    it lowers the sum most for each element it costs (ActNN,
    arXiv:2104.14129, Sec. 4.2). The gains of one tensor fall with its bits,
    so that the result is optimal for the bits that it uses; the rest of the
    budget is smaller than the next tensor.

    Args:
        costs (Sequence[float]): Variance at one bit, not negative.
        sizes (Sequence[int]): Elements of each tensor.
        budget (float): Sum of bits over all elements.
        rotated (bool, optional): See
            :func:`.variance.relative_variance`. Defaults to False.

    Returns:
        list[int]: Bits of each, 1 to 8; 1 for all where even that exceeds
        the budget.
    """
    bits = [MIN_BITS] * len(costs)
    variances = [0.0] + [
        relative_variance(b, rotated) for b in range(MIN_BITS, MAX_BITS + 1)
    ]
    left = budget - MIN_BITS * sum(sizes)

    def entry(i):
        gain = costs[i] * (variances[bits[i]] - variances[bits[i] + 1])
        # The index makes the order of equal gains the same everywhere.
        return -gain / max(sizes[i], 1), i

    queue = [entry(i) for i in range(len(costs))]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        if sizes[i] > left:
            continue
        left -= sizes[i]
        bits[i] += 1
        if bits[i] < MAX_BITS:
            heapq.heappush(queue, entry(i))
    return bits
