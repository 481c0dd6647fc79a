"""Packages for setuptools: the rooms of qwen3_vlm, and conf/ as the package data of `qwen3_vlm.conf`.

Everything else stands in pyproject.toml, which cannot say "every package found, and one from another folder".
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["qwen3_vlm", "qwen3_vlm.*"]), "qwen3_vlm.conf"],
    package_dir={"qwen3_vlm.conf": "conf"},
    package_data={
        "qwen3_vlm": ["**/*.jinja", "**/*.json", "**/*.html", "hf/*.md"],
        "qwen3_vlm.conf": ["*.yaml", "*/*.yaml"],
    },
)
