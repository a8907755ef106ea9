"""Tests of what gets installed: sdist, wheel and editable install."""

import ast
import os
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.tools import ROOT

# Folders outside of the source distribution, slow to copy.
LEFT_OUT = shutil.ignore_patterns(
    '.*', 'build', 'dist', 'data', 'work_dirs', '__pycache__', '*.egg-info'
)
VERSION = ast.literal_eval(
    next(
        line.removeprefix('__version__ = ')
        for line in (ROOT / 'mmactnn' / '__init__.py').read_text().splitlines()
        if line.startswith('__version__ = ')
    )
)


def run(*command, cwd, **environ):
    inherited = dict(os.environ, MMACTNN_WITH_OPS='0')
    # It would come before what is installed.
    inherited.pop('PYTHONPATH', None)
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environ},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments, cwd, **environ):
    return run(
        *(sys.executable, '-m', 'pip', '--disable-pip-version-check'),
        *arguments,
        cwd=cwd,
        **environ,
    )


def files_below(folder):
    """Files of the source tree's ``folder`` that are installed."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    }


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    """A copy of the source tree, so that building leaves no traces in it."""
    target = tmp_path_factory.mktemp('source') / 'mmactnn'
    shutil.copytree(ROOT, target, ignore=LEFT_OUT)
    return target


@pytest.fixture(scope='module')
def sdist(tree, tmp_path_factory):
    target = tmp_path_factory.mktemp('sdist')
    code = f'from setuptools.build_meta import *; build_sdist({str(target)!r})'
    run(sys.executable, '-c', code, cwd=tree)
    return target / f'mmactnn-{VERSION}.tar.gz'


@pytest.fixture(scope='module')
def wheel(sdist, tmp_path_factory):
    """The wheel that pip builds from the sdist, without the extension."""
    target = tmp_path_factory.mktemp('wheel')
    pip('wheel', '--no-build-isolation', '--no-deps', sdist, cwd=target)
    (path,) = target.glob('*.whl')
    return path


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    """A directory outside the tree that the wheel is installed in."""
    target = tmp_path_factory.mktemp('site')
    pip('install', '--no-deps', '--target', target, wheel, cwd=target)
    return target


def test_sdist_holds_the_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {
            name.partition('/')[2]
            for name in archive.getnames()
            if '__pycache__' not in name
        }
    for folder in ('build_support', 'configs', 'csrc', 'tests', 'tools'):
        assert files_below(folder) <= names
    assert {'setup.py', 'model-index.yml', 'LICENSE', 'Makefile'} <= names
    assert not any(name.startswith('mmactnn/.mim') for name in names)
    assert not any(name.endswith('.so') for name in names)


def test_wheel_is_for_every_python(wheel):
    assert wheel.name == f'mmactnn-{VERSION}-py3-none-any.whl'


def test_wheel_holds_the_package_and_nothing_beside_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split('/')[0] for name in names} == {
        'mmactnn',
        f'mmactnn-{VERSION}.dist-info',
    }
    assert not any('csrc' in name or name.endswith('.pyc') for name in names)


def test_wheel_holds_configs_and_tools(wheel):
    prefix = 'mmactnn/.mim/'
    names = {
        name.removeprefix(prefix)
        for name in zipfile.ZipFile(wheel).namelist()
        if name.startswith(prefix)
    }
    assert names == (
        files_below('configs') | files_below('tools') | {'model-index.yml'}
    )


def test_installed_package_imports(installed, run_in_fork):
    code = 'import mmactnn; print(mmactnn.__file__);print(mmactnn.__version__)'
    done = run_in_fork(code, installed)
    assert done.returncode == 0, done.stderr
    path, version = done.stdout.split()[-2:]
    assert Path(path) == installed / 'mmactnn' / '__init__.py'
    assert version == VERSION


def test_installed_configs_are_found(installed, run_in_fork):
    """As a base of somebody's config, and by the tools beside them."""
    config = installed / 'mine.py'
    config.write_text("_base_ = 'mmactnn::actnn/retinanet_r18_digits.py'\n")
    tool = installed / 'mmactnn' / '.mim' / 'tools' / 'train.py'
    code = f"""
import runpy
import sys
import mmactnn
from mmengine.config import Config
print(Config.fromfile({str(config)!r}).model.type)
sys.argv = [{str(tool)!r}, '--help']
runpy.run_path(sys.argv[0], run_name='__main__')
"""
    done = run_in_fork(code, installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == 'RetinaNet'
    assert '--auto-scale-lr' in done.stdout


def test_editable_install_links_configs_and_tools(tree, tmp_path):
    # An environment of its own that sees the packages of this one.
    run(sys.executable, '-m', 'venv', '--without-pip', tmp_path, cwd=tree)
    (library,) = tmp_path.glob('lib/python*/site-packages')
    (library / 'outer.pth').write_text('\n'.join(site.getsitepackages()))
    python = tmp_path / 'bin' / 'python'
    pip(
        *('--python', python, 'install', '--no-build-isolation', '--no-deps'),
        *('--editable', tree),
        cwd=tmp_path,
    )
    mim = tree / 'mmactnn' / '.mim'
    for name in ('configs', 'tools', 'model-index.yml'):
        assert (mim / name).is_symlink()
        assert (mim / name).resolve() == tree / name
    # Where it would be imported from; test_installed_package_imports does it.
    code = 'import importlib.util as u; print(u.find_spec("mmactnn").origin)'
    output = run(python, '-c', code, cwd=tmp_path)
    assert Path(output.split()[-1]) == tree / 'mmactnn' / '__init__.py'


@pytest.mark.skipif(
    not (ROOT / 'mmactnn' / '_C.abi3.so').exists(),
    reason='the extension was not built',
)
def test_extension_is_bound_to_no_python_and_no_torch():
    """One file for all: it uses torch's stable C interface and nothing else.

    Symbols of Python, or of torch's C++ namespaces, would tie it to the
    version that it was built with.
    """
    output = run(
        *('nm', '--dynamic', '--undefined-only', '--demangle'),
        ROOT / 'mmactnn' / '_C.abi3.so',
        cwd=ROOT,
    )
    symbols = [line.split('U ', 1)[-1] for line in output.splitlines()]
    assert any(symbol.startswith('aoti_torch_') for symbol in symbols)
    bound = ('Py', '_Py', 'at::', 'c10::', 'torch::', 'caffe2::')
    assert [name for name in symbols if name.startswith(bound)] == []


def test_import_loads_no_slow_part_of_torch():
    """The compiler and sharding take a second each."""
    code = (
        'import sys, mmactnn\n'
        'slow = "torch._dynamo", "torch.distributed.fsdp"\n'
        'print([name for name in slow if name in sys.modules])'
    )
    # In a process of its own: those of other tests have loaded them.
    printed = subprocess.check_output([sys.executable, '-c', code], text=True)
    assert printed.strip() == '[]'
