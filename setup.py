"""Installs megatron_tikmix; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="megatron_tikmix",
    version="0.1.0",
    description="Megatron-Core pretraining whose domain mixture follows the model (TiKMiX)",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_tikmix", "megatron_tikmix.*"]),
    package_data={"megatron_tikmix": ["py.typed", "monitoring/report.html.j2"]},
    entry_points={"console_scripts": ["tikmix = megatron_tikmix.cli.main:main"]},
    # One line of reason for each dependency.
    install_requires=[
        "torch>=2.6",  # tensors, autograd, process groups
        "megatron-core>=0.16,<0.20",  # model, parallelism, optimizer, datasets, checkpoints
        "numpy>=1.26",  # mixing works on plain arrays
        "scipy>=1.16",  # SLSQP with its multipliers, linear programs, t quantiles
        "clarabel>=0.9",  # interior-point solver: TiKMiX-D with many domains, or with cones
        "lightgbm>=4.3",  # trees of the mixture surrogate of TiKMiX-M
        "tensorboard>=2.15",  # live curves
        "pillow>=10.1",  # heat maps as images in TensorBoard, which needs it too
        "jinja2>=3.1",  # report.html, which it escapes; torch needs it too
        "plotly>=6.0",  # the pictures of report.html, interactive and offline
        "rich>=13.7",  # progress bar and tables on the terminal
        "jsonargparse>=4.40,<5",  # typed YAML and command line from dataclasses
        "docstring-parser>=0.16",  # lets --help show the docstrings of the configuration
        "PyYAML>=6.0",  # manifests and configurations
        "tokenizers>=0.20",  # byte-level BPE
        "psutil>=5.9",  # megatron-core's checkpoint writer imports it without declaring it
    ],
    extras_require={
        "datasets": ["datasets>=3.0"],  # Parquet, Arrow folders and .zst in preprocessing
        "dev": [
            "datasets>=3.0",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",  # the unit tests on two cores
            "hypothesis>=6.100",
            "cvxpy>=1.6",  # states TiKMiX-D's problem a second time,
            "ecos>=2.0.14",  # and solves it with another solver
            "ruff>=0.6",
            "mypy>=1.11",
            "types-PyYAML",
            "scipy-stubs",
        ],
        "benchmarks": ["kronfluence==1.0.1"],  # benchmarks/influence.py compares with it
    },
)
