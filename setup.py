"""The installed packages: tlvit, and the recipes of configs/ as tlvit.configs. See pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["tlvit", "tlvit.*"]), "tlvit.configs"],
    package_dir={"tlvit.configs": "configs"},
)
