"""Packages of fastrlhf. `fastrlhf/kernels` is a link to ../kernels, so namespace discovery finds it as a subpackage."""

from __future__ import annotations

from setuptools import find_namespace_packages, setup

setup(packages=find_namespace_packages(include=["fastrlhf", "fastrlhf.*"]))
