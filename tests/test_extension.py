"""Loading the kernels, and what is said when that fails."""

from pathlib import Path

import mmengine
import pytest
import torch

import mmactnn
from mmactnn import __main__, extension
from mmactnn.ops import self_check as checks
from mmactnn.ops.self_check import self_check

PACKAGE = Path(mmactnn.__file__).parent


@pytest.fixture
def copy_of_package(tmp_path):
    """The Python files of the package, elsewhere and without a library."""
    for source in PACKAGE.rglob('*.py'):
        if '.mim' not in source.parts:
            target = tmp_path / 'mmactnn' / source.relative_to(PACKAGE)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(source.read_text())
    return tmp_path


# Which distribution a module is of, it asks for each anew.
QUICK = (
    'import functools, importlib.metadata as metadata; '
    'names = functools.cache(metadata.packages_distributions); '
    'metadata.packages_distributions = names'
)
USE = (
    'import torch, mmactnn; conv = mmactnn.QConv2d(1, 1, 1); '
    'conv(torch.rand(1, 1, 8, 8))'
)


def test_build_info():
    info = extension.build_info()
    assert info['torch'].startswith('2.')
    assert info['compiler']
    assert (info['cuda'] is None) == (info['cuda_archs'] is None)
    assert (info['cuda'] is not None) == extension.has_kernels('cuda')


def test_library_uses_no_symbols_of_one_python_or_torch():
    library = extension.find_library()
    assert library.name == '_C.abi3.so'
    text = library.read_bytes()
    # Mangled names of ATen and c10 tie a binary to one release of torch.
    assert b'_ZN2at' not in text and b'_ZN3c106detail' not in text
    assert b'libtorch_python' not in text


def test_missing_library_is_said_when_it_is_needed(
    copy_of_package, run_in_fork
):
    imported = run_in_fork('import mmactnn', copy_of_package)
    assert imported.returncode == 0, imported.stderr
    used = run_in_fork(USE, copy_of_package)
    last = used.stderr.strip().splitlines()[-1]
    assert last.startswith('RuntimeError: mmactnn was installed without')
    assert 'pip install --no-build-isolation' in last


def test_broken_library_is_said_with_its_cause(copy_of_package, run_in_fork):
    (copy_of_package / 'mmactnn/_C.abi3.so').write_bytes(b'no library')
    used = run_in_fork(USE, copy_of_package)
    last = used.stderr.strip().splitlines()[-1]
    assert last.startswith('RuntimeError: ')
    assert '_C.abi3.so cannot be loaded with torch' in last
    assert torch.__version__ in last and 'torch >= 2.10' in last


def test_exact_layers_need_no_library(copy_of_package, run_in_fork):
    code = (
        'import torch, mmactnn; conv = mmactnn.QConv2d(1, 1, 1); '
        'mmactnn.convert_model(conv, "L0"); '
        'conv(torch.rand(1, 1, 8, 8)).sum().backward()'
    )
    used = run_in_fork(code, copy_of_package)
    assert used.returncode == 0, used.stderr


def test_report(run_in_fork):
    code = f"""
import os
import runpy
{QUICK}
os.environ['COLUMNS'] = '200'
runpy.run_module('mmactnn', run_name='__main__')
"""
    result = run_in_fork(code, PACKAGE.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    for expected in (
        mmactnn.__version__,
        torch.__version__,
        *(f'mmactnn::{op}' for op in extension.op_names()),
        'self-check on cpu',
        mmengine.__version__,
    ):
        assert expected in result.stdout
    for kind in self_check('cpu'):
        assert f'{kind}: ok' in result.stdout


def test_report_of_a_check_that_fails(monkeypatch, capsys):
    def broken(device):
        return dict(quantize='ok', pool='the result differs')

    monkeypatch.setattr(__main__, 'self_check', broken)
    monkeypatch.setattr(__main__, '_STACK', ('mmengine', 'no_such_module'))
    assert __main__.main() == 1
    text = ' '.join(capsys.readouterr().out.split())
    assert 'problem: self-check of pool on cpu: the result differs' in text


def test_self_check_catches_wrong_results(monkeypatch):
    assert set(self_check('cpu').values()) == {'ok'}
    dropout = checks.dropout
    monkeypatch.setattr(checks, 'dropout', lambda *a: dropout(*a) + 1)
    results = self_check('cpu')
    assert results.pop('dropout') == 'the result differs from the reference'
    assert set(results.values()) == {'ok'}


def test_kernels_of_an_op():
    built = ['CPU', 'CUDA'] if extension.has_kernels('cuda') else ['CPU']
    assert extension.kernels_of('quantize') == [*built, 'Meta']


def test_report_names_a_missing_library(copy_of_package, run_in_fork):
    result = run_in_fork(
        f'{QUICK}; import sys\n'
        'from mmactnn.__main__ import main; sys.exit(main())',
        copy_of_package,
    )
    assert result.returncode == 1
    assert 'problem' in result.stdout and 'not loaded' in result.stdout
