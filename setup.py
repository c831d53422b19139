"""Lists the packages: tlvit, and the recipes of configs/ as tlvit.configs. All else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["tlvit", "tlvit.*"]), "tlvit.configs"],
    package_dir={"tlvit.configs": "configs"},
)
