"""Tests of all ops."""

import ast
import re
from pathlib import Path

import pytest
import torch
from support.tools import ROOT

import mmactnn
from mmactnn import extension, ops

CSRC = ROOT / 'csrc'


def test_every_op_is_checked():
    sources = [
        ast.unparse(node)
        for path in Path(__file__).parent.glob('test_*.py')
        for node in ast.parse(path.read_text()).body
        if getattr(node, 'name', None) == 'test_opcheck'
    ]
    text = ' '.join(sources).replace('.', ' ').replace("'", ' ')
    words = set(text.replace('(', ' ').replace(',', ' ').split())
    assert set(extension.op_names()) <= words


def test_every_source_is_compiled():
    included = re.findall(
        r'^#include "ops/(.*)"$', (CSRC / 'ops.cpp').read_text(), re.M
    )
    assert included == sorted(path.name for path in CSRC.glob('ops/*.cpp'))


@pytest.mark.parametrize('op', extension.op_names())
def test_every_op_has_all_kernels(op):
    built = ['CPU', 'CUDA'] if extension.has_kernels('cuda') else ['CPU']
    assert extension.kernels_of(op) == [*built, 'Meta']


@pytest.mark.parametrize('op', extension.op_names())
def test_every_op_is_a_function_of_the_package(op):
    assert op in ops.__all__
    assert getattr(ops, op).__doc__


def test_results_require_no_gradient():
    x = torch.randn(2, 8, requires_grad=True)
    results = torch.ops.mmactnn.quantize.default(x, 2, 64, 1, 0)
    assert not any(result.requires_grad for result in results)
    assert mmactnn.ops.quantize is ops.quantize
