"""Other people's trainers in small, for the tests of `use_kernels`: one of several processes that train a model with
DistributedDataParallel or fully_shard, and the model by itself on all their batches."""

import json
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from opensora_fast import STDiT2, STDiT2Config, use_kernels
from opensora_fast.benchmarks.providers.upstream import UpstreamSTDiT2
from opensora_fast.kernels import gelu_tanh

MODELS = {"own": STDiT2, "upstream's": UpstreamSTDiT2}
CONFIG = STDiT2Config(
    hidden_size=48,
    num_heads=2,
    depth=2,
    input_sq_size=512,
    qk_norm=True,
    caption_channels=16,
    model_max_length=4,
    class_dropout_prob=0,
)


def make_model(name: str) -> nn.Module:
    """No weight is zero."""
    torch.manual_seed(0)
    model = MODELS[name](CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_(0, 0.02)
    return model


def make_batch(number: int) -> dict[str, Tensor]:
    """Batches have different shapes; in every other some frames are given."""
    generator = torch.Generator().manual_seed(number)
    videos, frames = 2 - number % 2, 2 + number % 3
    ones = torch.ones(videos)
    batch = {
        "x": torch.randn(videos, 4, frames, 4, 6, generator=generator),
        "timestep": ones * 300 + number,
        "y": torch.randn(videos, 1, 4, 16, generator=generator),
        "mask": torch.ones(videos, 4, dtype=torch.long),
        "num_frames": ones * frames,
        "height": ones * 32,
        "width": ones * 48,
        "ar": ones * 1.5,
        "fps": ones * 24,
    }
    batch["mask"][-1, 2:] = 0
    if number % 2 == 0:
        batch["x_mask"] = torch.arange(frames).expand(videos, -1) > 0
    return batch


def get_loss(model: nn.Module, number: int) -> Tensor:
    output = model(**make_batch(number))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(number))
    return (output * weights).square().mean() + (output * weights).mean()


def get_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def train(model: nn.Module, *numbers: int) -> dict[str, Tensor]:
    """The gradients of the sum of the losses of these batches."""
    model.zero_grad()
    for number in numbers:
        get_loss(model, number).backward()
    return get_gradients(model)


def get_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of a parameter's gradient, relative; gradients that are rounding only count by all of them."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    least = 1e-4 * torch.cat([value.flatten() for value in expected.values()]).norm()
    return max(float((found[name] - value).norm() / (value.norm() + least)) for name, value in expected.items())


def recompute(model: nn.Module, reentrant: bool) -> None:
    """PyTorch's activation checkpointing around every block."""
    blocks = set(model.blocks)
    implementation = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    wrap = partial(checkpoint_wrapper, checkpoint_impl=implementation)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=lambda module: module in blocks)


def data_parallel(model: nn.Module, numbers: tuple[int, ...], use_before: bool, **options) -> dict[str, Tensor]:
    if use_before:
        use_kernels(model, "reference")
    parallel = DistributedDataParallel(model, **options)
    if not use_before:
        use_kernels(parallel, "reference")
    with parallel.no_sync():
        for number in numbers[:-1]:
            get_loss(parallel, number).backward()
    get_loss(parallel, numbers[-1]).backward()
    return get_gradients(model)


def shard(model: nn.Module, numbers: tuple[int, ...], use_before: bool, recomputed: bool) -> dict[str, Tensor]:
    if use_before:
        use_kernels(model, "reference")
    if recomputed:
        recompute(model, reentrant=False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # where there is a GPU too
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if not use_before:
        use_kernels(model, "reference")
    for number in numbers:
        get_loss(model, number).backward()
    prefix = "_checkpoint_wrapped_module."
    return {name.replace(prefix, ""): gradient.full_tensor() for name, gradient in get_gradients(model).items()}


WAYS = {
    "data parallel": partial(data_parallel, use_before=True),
    "data parallel, kernels after": partial(data_parallel, use_before=False),
    "data parallel, unused parameters looked for": partial(data_parallel, use_before=True, find_unused_parameters=True),
    "sharded": partial(shard, use_before=True, recomputed=False),
    "sharded and recomputed, kernels after": partial(shard, use_before=False, recomputed=True),
}


def compare() -> int:
    """Rank 0 prints, of each model and way, how far the gradients are from those of the model by itself."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = tuple(range(rank, 2 * world_size, world_size))  # two micro-batches each
    errors = {}
    for name in MODELS:
        alone = train(make_model(name), *range(2 * world_size))
        expected = {key: value / world_size for key, value in alone.items()}
        for way, take in WAYS.items():
            errors[f"{name}, {way}"] = get_error(take(make_model(name), own), expected)
    if rank == 0:
        print(json.dumps({"errors": errors, "refusals": refuse_shares()}))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def refuse_shares() -> list[str]:
    """What is said where less than a block is sharded, and where an op is given a share."""
    said = []
    alone = init_device_mesh("cpu", (1,))
    part, whole = make_model("own"), make_model("own")
    fully_shard(part.blocks[0].attn, mesh=alone)
    fully_shard(whole, mesh=alone)
    bias = distribute_tensor(torch.zeros(8), alone)
    x, *batch = make_batch(1).items()
    for call in (
        lambda: get_loss(part, 0),
        lambda: whole.forward_packed(list(x[1]), **dict(batch)),
        lambda: gelu_tanh(torch.zeros(3, 8), bias, backend="reference"),
        lambda: whole.save_pretrained("/dev/null/model"),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said
