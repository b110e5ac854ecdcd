"""Builds zeroopt._C: setuptools hands over to CMake and Ninja. The metadata is in pyproject.toml."""

import os
import tempfile

from setuptools import setup
from setuptools.command.egg_info import egg_info

if "MAX_JOBS" in os.environ:
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", os.environ["MAX_JOBS"])


class LabelledEggInfo(egg_info):
    """How wheels differ that are built of the same sources, as in 0.1.0+cu130. Set last: a source distribution has a file of options."""

    def finalize_options(self) -> None:
        if label := os.environ.get("ZEROOPT_LOCAL_VERSION"):
            self.tag_build = f"+{label}"
        super().finalize_options()


options: dict[str, dict[str, str]] = {}

# Beside sources that cannot be written, nothing is left: what is made on the way lies in a folder that goes with this process.
if not os.access(".", os.W_OK):
    scratch = tempfile.TemporaryDirectory(prefix="zeroopt-build-")
    options["egg_info"] = {"egg_base": scratch.name}
    options["build"] = {"build_base": scratch.name}

setup(cmake_source_dir=".", cmdclass={"egg_info": LabelledEggInfo}, options=options)
