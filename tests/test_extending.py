"""The examples of docs/extending.md, from outside of the package."""

import json
import re

import pytest
from support.tools import ROOT

_BLOCK = re.compile(r'^```python\n(# (\w+\.py)\n.*?)^```$', re.M | re.S)
DOCUMENT = (ROOT / 'docs' / 'extending.md').read_text()


@pytest.fixture(scope='module')
def found(tmp_path_factory, run_in_fork):
    """Results of support/extending_checks.py with the examples as files."""
    folder = tmp_path_factory.mktemp('outside')
    for text, name in _BLOCK.findall(DOCUMENT):
        (folder / name).write_text(text)
    script = ROOT / 'tests' / 'support' / 'extending_checks.py'
    done = run_in_fork(script.read_text(), folder, ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_unbiased(errors, rounded):
    """The mean of many draws is far nearer to torch's gradient than one."""
    for key, (one, mean) in errors.items():
        if key in rounded:
            assert 0.01 < one < 0.5, key
            # A 20th for 400 draws, and some more for chance.
            assert mean < one / 10, key
        else:
            assert one < 1e-5, key


def test_every_block_is_run():
    assert len(_BLOCK.findall(DOCUMENT)) == DOCUMENT.count('```python')


class TestLayer:
    @pytest.fixture
    def layer(self, found):
        return found['check_layer']

    def test_converted_and_reverted(self, layer):
        assert layer['targets'] == ['QSnake'] * 3
        assert layer['bits'] == [4] * 3
        assert '1 Named -> QSnake (4 bit)' in layer['report']
        assert layer['reverted'] == ['0', '1', '2']
        assert layer['classes'] == ['Snake', 'Named', 'Snake']

    def test_computes_as_torch(self, layer):
        assert layer['same'] and layer['is_exact'] and layer['follows_func']
        assert_unbiased(layer['errors'], {'input'})
        assert layer['refused'].startswith('QSnake cannot be differentiated')

    def test_counted_by_its_rule(self, layer):
        inputs = 3 * 8 * 512 * 4
        exact = layer['layers_exact_bytes']
        assert layer['exact_bytes'] == exact == 2 * inputs
        # 4 of 32 bits, and ranges.
        assert inputs / 8 < layer['saved_bytes'] < inputs / 7

    def test_names_in_configs(self, found):
        assert found['check_names'] == [True] * 3


class TestFunction:
    def test_computes_as_torch(self, found):
        function = found['check_function']
        assert function['compressed'] and function['same']
        assert_unbiased(function['errors'], {'input', 'fc.weight', 'fc.bias'})

    def test_rule(self, found):
        assert found['check_function']['left'] == 'AtanBackward0'


class TestPattern:
    @pytest.fixture
    def pattern(self, found):
        return found['check_pattern']

    def test_site_is_used(self, pattern):
        assert pattern['used'] == pattern['in_copies'] == 1
        assert pattern['fused'] == [['0', ['gated_product']]]
        assert 'Gated fused: places of gated_product' in pattern['report']

    def test_only_where_it_should(self, pattern):
        assert pattern['alone'] == pattern['in_evaluation'] == 0
        assert pattern['class']

    def test_computes_as_the_calls(self, pattern):
        assert pattern['same']
        exact = {'0.value.bias', '0.out.bias'}
        assert_unbiased(pattern['errors'], pattern['errors'].keys() - exact)

    def test_keeps_less(self, pattern):
        fused, layers = pattern['bytes']
        assert fused == layers
        fused, layers = pattern['saved']
        # One of the factors, of 64 x 64 floats, at 4 bits.
        assert layers - fused > 64 * 64 * 3


class TestAdapter:
    @pytest.fixture
    def adapter(self, found):
        return found['check_adapter']

    def test_imported_when_needed(self, adapter):
        assert not adapter['imported_before'] and adapter['imported']

    def test_used_where_it_fits(self, adapter):
        assert adapter['adapted'] == [
            [name, 'QLevelHead', ['relu']] for name in ('head', 'wider')
        ]
        assert 'head.relu' in adapter['converted']
        assert 'layers in place of functions: relu' in adapter['report']

    def test_computes_as_its_parent(self, adapter):
        assert adapter['same'] and adapter['keys']
        exact, plain = adapter['exact']
        assert exact == plain > adapter['saved'] * 5

    def test_reverted(self, adapter):
        assert adapter['reverted']
        assert adapter['parts'] == ['conv', 'predict']
