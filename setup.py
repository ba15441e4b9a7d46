# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Build step of mmdensecl; its metadata is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# What `mim train mmdensecl <config>` reads from the installed package.
MIM_DATA = ('configs', 'tools', 'model-index.yml')


class BuildPyWithMim(build_py):
    """Copies configs, tools and the model index into the built package.

    They go to `<build_lib>/mmdensecl/.mim` only, so the source tree stays as
    it is. An editable install has no built package, hence no `.mim`.
    """

    def run(self) -> None:
        """Build the package, then add `.mim`."""
        super().run()
        if self.editable_mode:
            return
        target = self._mim_dir()
        # build/ may hold the files of an earlier build.
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in MIM_DATA:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(
                    source,
                    target / name,
                    ignore=shutil.ignore_patterns('__pycache__', '*.py[co]'),
                )
            else:
                shutil.copy2(source, target / name)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return the files that `run` writes."""
        mim = [str(p) for p in self._mim_dir().rglob('*') if p.is_file()]
        return super().get_outputs(include_bytecode) + mim

    def _mim_dir(self) -> Path:
        return Path(self.build_lib) / 'mmdensecl' / '.mim'


setup(cmdclass={'build_py': BuildPyWithMim})
