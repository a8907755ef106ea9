"""Checks of the examples in docs/extending.md, from outside of the package.

Runs in a process of its own, in the folder that the examples are written to;
prints the results as JSON.
"""

import copy
import json
import sys

import torch
from torch import nn

import mmactnn

# Draws whose mean is compared with torch's gradient.
NUM_DRAWS = 400


class Gated(nn.Module):
    """A gated block, as a user writes it."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(32, 64)
        self.act = nn.GELU()
        self.value = nn.Linear(32, 64)
        self.out = nn.Linear(64, 32)

    def forward(self, x):
        return self.out(self.act(self.gate(x)) * self.value(x))


def gradients(module, x):
    """Gradients of the input and of the parameters, by name."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    output = module(x)
    output.backward(torch.linspace(-1, 2, output.numel()).view_as(output))
    grads = {name: p.grad for name, p in module.named_parameters()}
    return output.detach(), dict(grads, input=x.grad)


def errors_of_mean(module, plain, x):
    """Relative error of one draw's gradients, and of the mean of many."""
    _, expected = gradients(plain, x)
    draws = [gradients(module, x)[1] for _ in range(NUM_DRAWS)]
    found = {}
    for key, value in expected.items():
        norm = value.norm()
        mean = torch.stack([draw[key] for draw in draws]).mean(0)
        found[key] = [
            float((draws[0][key] - value).norm() / norm),
            float((mean - value).norm() / norm),
        ]
    return found


def check_layer():
    """Conversion, subclasses, report, gate, gradients and the count."""
    before = 'qsnake' in sys.modules
    import qsnake
    from snake import Snake

    class Named(Snake):
        """Leaves the forward pass alone."""

    model = nn.Sequential(Snake(), Named(), Snake())
    plain = copy.deepcopy(model)
    report = mmactnn.convert_model(model, 'L2')
    x = torch.randn(8, 512)
    with mmactnn.measure_activations(model) as meter:
        output = model(x.requires_grad_())
    same = torch.equal(output, plain(x))
    exact = copy.deepcopy(model)
    mmactnn.convert_model(exact, 'L0')
    is_exact = all(
        torch.equal(a, b)
        for a, b in zip(
            gradients(exact, x)[1].values(), gradients(plain, x)[1].values()
        )
    )
    batched = torch.func.vmap(model[0])(x)
    grad = torch.autograd.grad((model(x) ** 2).sum(), x, create_graph=True)[0]
    try:
        grad.sum().backward()
        refused = ''
    except RuntimeError as error:
        refused = str(error)
    mean = errors_of_mean(qsnake.QSnake(), Snake(), torch.randn(4, 64))
    reverted = mmactnn.revert_model(model)
    return dict(
        imported_before=before,
        report=str(report),
        targets=[item.target for item in report.converted],
        bits=[item.bits for item in report.converted],
        same=same,
        is_exact=is_exact,
        follows_func=torch.equal(batched, Snake()(x)),
        refused=refused,
        exact_bytes=meter.exact_bytes,
        saved_bytes=meter.saved_bytes,
        layers_exact_bytes=meter.layers_exact_bytes,
        errors=mean,
        reverted=reverted,
        classes=[type(part).__name__ for part in model],
    )


def check_names():
    """Names for configs, of MMEngine and of MMCV's layers."""
    import qsnake
    from mmcv.cnn import build_activation_layer
    from mmengine.registry import MODELS

    built = [
        MODELS.build(dict(type='QSnake')),
        MODELS.build(dict(type='mmactnn.QSnake', bits=2)),
        build_activation_layer(dict(type='QSnake')),
    ]
    return [type(layer) is qsnake.QSnake for layer in built]


def check_function():
    """A module that calls it, against torch."""
    from atan_function import _Atan

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x):
            return self.fc(x).atan()

    model = Calls()
    plain = copy.deepcopy(model)
    mmactnn.convert_model(model, dict(base='L2', conv=8))
    x = torch.randn(4, 64)
    node = model(x.clone().requires_grad_()).grad_fn
    same = torch.equal(model(x), plain(x))
    errors = errors_of_mean(model, plain, x)
    mmactnn.convert_model(model, dict(base='L2', rules={'atan': None}))
    return dict(
        compressed=node.name() == f'{_Atan.__name__}Backward',
        same=same,
        errors=errors,
        left=model(x.clone().requires_grad_()).grad_fn.name(),
    )


def check_pattern():
    """The site runs, computes the same, and keeps codes."""
    import gated_product

    calls = []
    run = gated_product.GatedProduct.run

    def counting_run(self, *args):
        calls.append(self.pattern)
        return run(self, *args)

    gated_product.GatedProduct.run = counting_run
    torch.manual_seed(0)
    model = nn.Sequential(Gated())
    plain = copy.deepcopy(model)
    layers = copy.deepcopy(model)
    report = mmactnn.convert_model(model, 'L2')
    alone = mmactnn.convert_model(
        layers,
        dict(base='L2', fuse=False),
        # It leaves functions, such as the product, to torch.
        filter_fn=lambda module, name: True,
    )
    x = torch.randn(64, 32)
    with mmactnn.measure_activations(model) as meter:
        output = model(x)
    with mmactnn.measure_activations(layers) as layer_meter:
        layers(x)
    used = len(calls)
    found = dict(
        used=used,
        same=torch.equal(output, plain(x)),
        report=str(report),
        fused=[[item.name, item.patterns] for item in report.fused],
        alone=len(alone.fused),
        bytes=[meter.exact_bytes, layer_meter.exact_bytes],
        saved=[meter.saved_bytes, layer_meter.saved_bytes],
        errors=errors_of_mean(model, plain, x),
    )
    calls.clear()
    model.eval()(x)
    found['in_evaluation'] = len(calls)
    model.train()
    twin = copy.deepcopy(model)
    twin(x)
    found['in_copies'] = len(calls)
    mmactnn.revert_model(model)
    found['class'] = type(model[0]) is Gated
    return found


def check_adapter():
    """The adapter is used, computes the same, and is reverted."""
    import providers  # noqa: F401

    before = 'head_adapter' in sys.modules
    from their_heads import LevelHead

    class Wider(LevelHead):
        pass

    class Other(LevelHead):
        def forward_single(self, x):
            return self.predict(self.conv(x))

    torch.manual_seed(0)
    model = nn.ModuleDict(
        dict(head=LevelHead(8, 4), wider=Wider(8, 4), other=Other(8, 4))
    )
    plain = copy.deepcopy(model)
    report = mmactnn.convert_model(model, 'L2')
    features = [torch.randn(2, 8, size, size) for size in (8, 4)]
    expected = plain['head'](features)
    with mmactnn.measure_activations(model) as meter:
        found = model['head'](features)
    with mmactnn.measure_activations(plain) as plain_meter:
        plain['head'](features)
    same = all(map(torch.equal, found, expected))
    keys = list(model.state_dict()) == list(plain.state_dict())
    adapted = [[i.name, i.target, i.layers] for i in report.adapted]
    names = [item.name for item in report.converted]
    mmactnn.revert_model(model)
    return dict(
        imported_before=before,
        imported='head_adapter' in sys.modules,
        adapted=adapted,
        converted=names,
        report=str(report),
        same=same,
        keys=keys,
        exact=[meter.exact_bytes, plain_meter.exact_bytes],
        saved=meter.saved_bytes,
        reverted=[type(part) for part in model.values()]
        == [LevelHead, Wider, Other],
        parts=list(model['head']._modules),
    )


if __name__ == '__main__':
    torch.set_num_threads(1)
    torch.manual_seed(0)
    checks = (
        check_layer,
        check_names,
        check_function,
        check_pattern,
        check_adapter,
    )
    json.dump({c.__name__: c() for c in checks}, sys.stdout)
