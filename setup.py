"""Builds zeroopt._C: setuptools hands over to CMake and Ninja. The metadata is in pyproject.toml."""

import os

from setuptools import setup

if "MAX_JOBS" in os.environ:
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", os.environ["MAX_JOBS"])

setup(cmake_source_dir=".")
