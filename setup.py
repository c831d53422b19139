"""Packaging of tlvit: the tested version ranges and the optional extras."""

import pathlib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = {}
exec((ROOT / "tlvit" / "version.py").read_text(), VERSION)

TENSORFLOW = [
    "tensorflow-cpu>=2.20; platform_machine in 'x86_64 AMD64' and sys_platform != 'darwin'",
    "tensorflow>=2.20; platform_machine not in 'x86_64 AMD64' or sys_platform == 'darwin'",
    "tensorboard>=2.20",
]

setup(
    name="tlvit",
    version=VERSION["__version__"],
    description="Vision transformers trained with token labels, in JAX/Flax on TPU and GPU",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["tlvit", "tlvit.*"]),
    install_requires=[
        "absl-py>=2.0",
        "numpy>=1.26",
        # Python 3.11 ends at jax 0.10; flax 0.12.8 and 0.12.9 do not run on jax 0.11.
        "jax>=0.10.0,<0.11; python_version<'3.12'",
        "jax>=0.11.1; python_version>='3.12'",
        "flax>=0.12.8,<0.13; python_version<'3.12'",
        "flax>=0.12.10,<0.13; python_version>='3.12'",
        "optax>=0.2.6,<0.3",
        "orbax-checkpoint>=0.12.0,<1.0",
        "einops>=0.8",
        "ml-collections>=1.0",
        "clu>=0.0.12",
        "pillow>=10.3",
        "safetensors>=0.4",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources>=6",  # used by tfds 4.9.10, which does not declare it
        "etils[epath]>=1.9",
    ],
    extras_require={
        "tf": TENSORFLOW,
        "gpu": ["jax[cuda13]"],  # NVIDIA driver >= 580
        "gpu-cuda12": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        "torch": ["torch>=2.5"],  # only to read pickled PyTorch checkpoints
        "demo": [*TENSORFLOW, "scikit-learn>=1.4", "matplotlib>=3.8"],
        "dev": [
            *TENSORFLOW,
            "scikit-learn>=1.4",
            "matplotlib>=3.8",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff==0.17.5",
        ],
    },
)
