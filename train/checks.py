"""What can be refused of a run before anything is loaded or made: T5 alone takes minutes to load."""

from collections.abc import Collection

import torch

from opensora_fast.config import TrainConfig
from opensora_fast.cuda_graphs import refuse_without_gpu
from opensora_fast.device import DTYPES
from opensora_fast.kernels.dispatch import BACKENDS, check_triton
from opensora_fast.kernels.linear import LINEAR_BACKENDS, check_quack
from opensora_fast.train.monitoring.out_of_memory import refuse_history_without_gpu
from opensora_fast.train.monitoring.trace import refuse_trace_after_end
from opensora_fast.train.monitoring.trackers import check_trackers
from opensora_fast.train.parts import build_diffusion, count_recomputed, make_model_config


def check_run(
    config: TrainConfig,
    device: torch.device | None,
    backend: str,
    linear: str,
    trace_steps: tuple[int, int] | None,
    memory_history: bool,
) -> None:
    """Refuse what cannot be done, before a run or without one.

    Args:
        config: the configuration.
        device: that of the run; None where it is not known. A GPU need not be here.
        backend, linear, trace_steps, memory_history: as for `train`.

    Raises:
        ValueError: a model or diffusion that cannot be built, an implementation of an unknown name, a tracker that is
            not installed, a trace after the end; CUDA graphs, Triton, quack or a memory history without a GPU.
    """
    check_choice("--kernels", backend, BACKENDS)
    check_choice("--linear", linear, LINEAR_BACKENDS)
    build_diffusion(config)
    # What the encoders decide fits any model.
    model = make_model_config(config, in_channels=4, caption_channels=4096, model_max_length=200)
    count_recomputed(config.grad_checkpoint, model.depth)
    check_trackers(config)
    refuse_trace_after_end(trace_steps, config.steps)
    if device is None:
        return
    refuse_without_gpu(config.cuda_graph_tokens, device.type)
    refuse_history_without_gpu(memory_history, device.type)
    if backend == "triton":
        check_triton("--kernels triton", device)
    if linear == "quack" and (device.type == "cpu" or torch.cuda.is_available()):
        check_quack(device, DTYPES[config.dtype])


def check_choice(option: str, chosen: str, known: Collection[str]) -> None:
    """ValueError where an option of the command line is none of its values."""
    if chosen not in known:
        raise ValueError(f"{option} {chosen}: unknown; choose one of {', '.join(known)}")
