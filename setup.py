"""Builds zeroopt._C: setuptools hands over to CMake and Ninja. The metadata is in pyproject.toml."""

import os
import tempfile

from setuptools import setup

options: dict[str, dict[str, str]] = {}

if "MAX_JOBS" in os.environ:
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", os.environ["MAX_JOBS"])

# How wheels differ that are built of the same sources, as in 0.1.0+cu130.
if label := os.environ.get("ZEROOPT_LOCAL_VERSION"):
    options["egg_info"] = {"tag_build": f"+{label}"}

# Beside sources that cannot be written, nothing is left: what is made on the way lies in a folder that goes with this process.
if not os.access(".", os.W_OK):
    scratch = tempfile.TemporaryDirectory(prefix="zeroopt-build-")
    options.setdefault("egg_info", {})["egg_base"] = scratch.name
    options["build"] = {"build_base": scratch.name}

setup(cmake_source_dir=".", options=options)
