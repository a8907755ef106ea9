"""Functions of torch in Python, whose parts are compressed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.layers import assert_same_bits, relative_error
from torch import nn

from mmactnn import convert_model, measure_activations


class Pool(nn.Module):
    """Attention with the parameters of linear layers, as in CLIP's ResNet."""

    def __init__(self, need_weights, width=32):
        super().__init__()
        self.need_weights = need_weights
        self.before = nn.Linear(width, width)
        names = ('q', 'k', 'v', 'out')
        self.parts = nn.ModuleDict({n: nn.Linear(width, width) for n in names})

    def forward(self, x):
        x = self.before(x)
        parts = self.parts
        weights = {f'{n}_proj_weight': parts[n].weight for n in 'qkv'}
        output, found = F.multi_head_attention_forward(
            x,
            x,
            x,
            x.shape[-1],
            4,
            None,
            torch.cat([parts[n].bias for n in 'qkv']),
            None,
            None,
            False,
            0.0,
            parts['out'].weight,
            parts['out'].bias,
            need_weights=self.need_weights,
            use_separate_proj_weight=True,
            **weights,
        )
        if found is None:
            return output
        return output, found


class Packed(nn.Module):
    """Attention with the parameters of torch's layer."""

    def __init__(self, width=32):
        super().__init__()
        self.before = nn.Linear(width, width)
        self.attn = nn.MultiheadAttention(width, 4)

    def forward(self, x):
        x, attn = self.before(x), self.attn
        return F.multi_head_attention_forward(
            query=x,
            key=x,
            value=x.flip(0),
            embed_dim_to_check=x.shape[-1],
            num_heads=4,
            in_proj_weight=attn.in_proj_weight,
            in_proj_bias=attn.in_proj_bias,
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=attn.out_proj.weight,
            out_proj_bias=attn.out_proj.bias,
            need_weights=False,
        )[0]


def run(module, x):
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    outputs = module(leaf)
    if torch.is_tensor(outputs):
        outputs = (outputs,)
    torch.manual_seed(1)
    sum((y * torch.randn_like(y)).sum() for y in outputs).backward()
    return outputs, [leaf.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize(
    ('make', 'least'),
    [(lambda: Pool(False), 4), (lambda: Pool(True), 1.2), (Packed, 4)],
)
def test_attention(make, least):
    torch.manual_seed(0)
    module = make()
    twin = copy.deepcopy(module)
    fine = copy.deepcopy(module)
    convert_model(module, 'L2')
    convert_model(
        fine,
        dict(base='L2', conv=8, act=8, attention=8, attention_value=8),
    )
    x = torch.randn(24, 4, 32)
    ours, stock = run(fine, x), run(twin, x)
    for found, expected in zip(ours[0], stock[0]):
        assert_same_bits(found, expected)
    for found, expected in zip(ours[1], stock[1]):
        if expected is None:
            assert found is None
        elif expected.norm() > 1e-3:
            assert relative_error(found, expected) < 0.05
    kept = []
    for each in (module, twin):
        with measure_activations(each) as meter:
            each(x)
        kept.append(meter.saved_bytes)
    assert kept[0] < kept[1] / least


def test_layer_left_exact():
    """Torch's layer calls the function, too."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.attn = nn.MultiheadAttention(32, 4)

        def forward(self, x):
            x = self.fc(x)
            return self.attn(x, x, x, need_weights=False)[0]

    module = Net()
    convert_model(module, 'L2', exclude=['attn*'])
    output = module(torch.randn(6, 2, 32, requires_grad=True))
    todo, nodes = [output.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [before for before, _ in node.next_functions]
    names = [node.name() for node in nodes]
    assert any('ScaledDotProduct' in name for name in names)
    # Of the first layer.
    assert names.count('_LinearBackward') == 1


def test_tensor_subclass():
    class Counted(torch.Tensor):
        calls = []

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.calls.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    module = Pool(False)
    module.before = nn.Identity()
    module.more = nn.Linear(2, 2)
    convert_model(module, 'L2')
    x = torch.randn(4, 2, 32).as_subclass(Counted)
    assert type(module(x)) is Counted
    assert F.multi_head_attention_forward in Counted.calls
