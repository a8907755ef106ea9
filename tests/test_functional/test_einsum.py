"""Products of two tensors by ``torch.einsum``."""

import pytest
import torch
from support.layers import assert_same_bits, relative_error
from torch import nn

from mmactnn import convert_model
from mmactnn.autograd import can_contract


class Product(nn.Module):
    """A product of two tensors that layers compute."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, x, y):
        return self.function(self.first(x), self.second(y))


# Equation and sizes of the factors.
COMPRESSED = {
    'masks': ('bqc,bchw->bqhw', (2, 3, 6), (2, 6, 5, 6)),
    'spaces': (' lbqc , bchw -> lbqhw ', (4, 2, 3, 6), (2, 6, 5, 6)),
    'transposed output': ('ab,cb->ca', (7, 6), (5, 6)),
    'elements': ('bxy,bxy->byx', (2, 5, 6), (2, 5, 6)),
    'an outer product': ('a,b->ba', (6,), (6,)),
    'a sum': ('ab,ab->', (5, 6), (5, 6)),
    'ellipsis': ('...id,...jd->...ij', (2, 3, 4, 6), (2, 3, 5, 6)),
    'broadcast ellipsis': ('...id,...jd->...ij', (3, 4, 6), (2, 1, 5, 6)),
}
LEFT = {
    'implicit output': ('ab,cb', (7, 6), (5, 6)),
    'a diagonal': ('aa,ab->ab', (6, 6), (6, 6)),
    'a sum of one factor': ('ab,cb->c', (7, 6), (5, 6)),
    'sizes that differ': ('ab,bc->ac', (7, 6), (1, 6)),
    'an ellipsis behind': ('a...,a...->a...', (7, 6), (7, 6)),
    'an ellipsis in one': ('a...,ab->b...', (7, 6), (7, 6)),
}


def run(module, inputs, autocast):
    module.zero_grad()
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        output = module(*leaves)
    torch.manual_seed(1)
    output.backward(torch.randn_like(output))
    grads = [leaf.grad for leaf in leaves]
    return output, grads + [p.grad for p in module.parameters()]


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('name', [*COMPRESSED, *LEFT])
def test_outputs_and_gradients(name, autocast):
    torch.manual_seed(0)
    equation, *sizes = (COMPRESSED | LEFT)[name]
    inputs = [torch.randn(size) for size in sizes]
    module = Product(lambda x, y: torch.einsum(equation, x, y))
    exact = run(module, inputs, autocast)
    convert_model(module, dict(base='L2', conv=8, act=8))
    ours = run(module, inputs, autocast)
    node = ours[0].grad_fn.name()
    assert (node == '_ProductBackward') == (name in COMPRESSED)
    assert_same_bits(ours[0], exact[0])
    for found, expected in zip(ours[1], exact[1]):
        assert found.dtype == expected.dtype
        assert relative_error(found, expected) < 0.05


def test_other_forms():
    """Lists of operands, sublists, and other numbers of factors."""
    forms = [
        lambda x, y: torch.einsum('ab,cb->ac', [x, y]),
        lambda x, y: torch.einsum(x, [0, 1], y, [2, 1], [0, 2]),
        lambda x, y: torch.einsum('ab,cb,db->acd', x, y, y),
        lambda x, y: torch.einsum('ab->ba', x) @ y,
        lambda x, y: torch.einsum('ab,cb->ac', x, y.detach()),
    ]
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    for form in forms:
        module = Product(form)
        exact = module(x, y)
        convert_model(module, 'L2')
        assert_same_bits(module(x, y), exact)


def test_invalid_equations():
    module = Product(lambda x, y: torch.einsum(equation, x, y))
    convert_model(module, 'L2')
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    for equation in ('abc,cb->ac', 'ab,cb->az', 'ab,ac->bc->a', 'a1,cb->ac'):
        assert not can_contract(equation, x, y)
        with pytest.raises(RuntimeError, match='einsum'):
            module(x, y)
