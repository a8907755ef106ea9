"""Installation of configs and tools to ``mmactnn/.mim``, for OpenMMLab.

MIM and ``_base_ = 'mmactnn::...'`` read an installed package's
``.mim/configs``, ``.mim/tools`` and ``.mim/model-index.yml``. They are added
by the build command rather than staged in the source tree before it, since
only the command knows the kind of the build: a wheel gets copies and leaves
the tree untouched, an editable install gets links into the tree.
"""

import os
import shutil
from pathlib import Path

from setuptools.command.build_py import build_py

PACKAGE = 'mmactnn'
MIM_ENTRIES = ('configs', 'tools', 'model-index.yml')

_ROOT = Path(__file__).resolve().parent.parent


class BuildPyWithMim(build_py):
    """``build_py`` that adds ``mmactnn/.mim``.

    Use it as ``setup(cmdclass=dict(build_py=BuildPyWithMim))``.
    """

    def run(self) -> None:
        """Build the modules, then link or copy the entries of ``.mim``."""
        super().run()
        if self.editable_mode:
            link_mim_files(_ROOT / PACKAGE / '.mim')
        else:
            copy_mim_files(Path(self.build_lib, PACKAGE, '.mim'))


def copy_mim_files(mim_dir: Path) -> None:
    """Copy configs, tools and the model index into a directory.

    Args:
        mim_dir (Path): Directory to make. One left by an earlier build is
            replaced, so that deleted configs do not live on in the wheel.

    Raises:
        FileNotFoundError: If the source tree lacks one of the entries.
    """
    _clear(mim_dir)
    mim_dir.mkdir(parents=True)
    for source in _sources():
        target = mim_dir / source.name
        if source.is_dir():
            ignored = shutil.ignore_patterns('__pycache__', '*.pyc')
            shutil.copytree(source, target, ignore=ignored)
        else:
            shutil.copy2(source, target)


def link_mim_files(mim_dir: Path) -> None:
    """Link configs, tools and the model index into a directory.

    Args:
        mim_dir (Path): Directory to make. The links in it are relative, so
            that the tree can be moved as a whole.

    Raises:
        FileNotFoundError: If the source tree lacks one of the entries.
    """
    _clear(mim_dir)
    mim_dir.mkdir(parents=True)
    for source in _sources():
        link = mim_dir / source.name
        link.symlink_to(os.path.relpath(source, mim_dir))


def _sources() -> list[Path]:
    sources = [_ROOT / name for name in MIM_ENTRIES]
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(
                f'{source} not found: expected {", ".join(MIM_ENTRIES)} '
                'beside setup.py'
            )
    return sources


def _clear(mim_dir: Path) -> None:
    # rmtree removes the links of an editable install, not their targets.
    if mim_dir.exists():
        shutil.rmtree(mim_dir)
