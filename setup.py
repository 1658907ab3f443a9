"""Packaging of opensora_fast.

`kernels/`, `train/` and `benchmarks/` stand at the top of the repository, where a reader looks for them, and install as
`opensora_fast.kernels`, `.train` and `.benchmarks`: a bare `kernels` in site-packages would collide with another
project.
"""

from setuptools import find_packages, setup

# A folder at the top of the repository and the package it becomes.
TOP_LEVEL_FOLDERS = {
    "kernels": "opensora_fast.kernels",
    "train": "opensora_fast.train",
    "benchmarks": "opensora_fast.benchmarks",
}


def list_packages() -> list[str]:
    packages = find_packages(include=["opensora_fast", "opensora_fast.*"])
    for folder, package in TOP_LEVEL_FOLDERS.items():
        packages.append(package)
        packages.extend(f"{package}.{name}" for name in find_packages(folder))
    return packages


setup(
    name="opensora_fast",
    version="0.1.0",
    description="Triton kernels, training stack and benchmarks for Open-Sora 1.1",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=list_packages(),
    package_dir={package: folder for folder, package in TOP_LEVEL_FOLDERS.items()},
    package_data={
        "opensora_fast.kernels.compilation": ["compile_budget.json"],
        "opensora_fast.kernels.configurations": ["*.json"],
        "opensora_fast.data.buckets": ["tables/*.json"],
        "opensora_fast.train": ["configs/*.py"],
        "opensora_fast.benchmarks": ["published/*", "results/**/*.csv"],
        "opensora_fast.benchmarks.predictions": ["*.csv"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=2",
        "pandas>=3.1",
        "pyarrow",
        "safetensors",
        "pydantic>=2",
        "typer>=0.20",
        "rich",
        "av>=18,<19",
        "pillow>=11",
        "matplotlib",
        "diffusers>=0.29",
        "transformers>=4.57",
        "sentencepiece",
        # transformers reads T5's sentencepiece file through it.
        "protobuf",
        "ftfy",
        "beautifulsoup4>=4.13",
    ],
    extras_require={
        "dali": ["nvidia-dali-cuda130>=2.4"],
        "demo": ["scikit-video==1.1.11"],
        "dev": [
            "pytest",
            "pytest-benchmark",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "selenium",
            "scikit-video==1.1.11",
            "tensorboard",
        ],
        "trackers": ["tensorboard", "wandb"],
        # Products of Linears; these two ran together, with torch for CUDA 13.
        "quack": ["quack-kernels[cu13]==0.6.5", "nvidia-cutlass-dsl[cu13]==4.8.1"],
    },
    entry_points={"console_scripts": ["opensora-fast=opensora_fast.cli:main"]},
)
