"""Greedy allocation of bits to tensors."""

import heapq

from ..ops import VALID_BITS

MIN_BITS, MAX_BITS = VALID_BITS[0], VALID_BITS[-1]


def allocate_bits(costs, sizes, budget):
    """Allocate bits so that the variance of rounding is minimal.

    Minimises ``sum(costs[i] / (2 ** bits[i] - 1) ** 2)`` under
    ``sum(sizes[i] * bits[i]) <= budget`` greedily: the next bit goes where
    it lowers the sum most for each element it costs (ActNN,
    arXiv:2104.14129, Sec. 4.2). The gains of one tensor fall with its bits,
    so that the result is optimal for the bits that it uses; the rest of the
    budget is smaller than the next tensor.

    Args:
        costs (Sequence[float]): Variance at one bit, not negative.
        sizes (Sequence[int]): Elements of each tensor.
        budget (float): Sum of bits over all elements.

    Returns:
        list[int]: Bits of each, 1 to 8; 1 for all where even that exceeds
        the budget.
    """
    bits = [MIN_BITS] * len(costs)
    left = budget - MIN_BITS * sum(sizes)

    def entry(i):
        levels, more = 2 ** bits[i] - 1, 2 ** (bits[i] + 1) - 1
        gain = costs[i] * (1 / levels**2 - 1 / more**2)
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
