"""A model whose calls of few tokens replay a CUDA graph: there the host takes longer to launch kernels than they take.

A video takes dozens of calls on inputs of the same shapes, so the graph of the shapes that came last is enough. The
text of a replayed call is padded to its longest, as the host may not read where it ends; results are the same but for
rounding.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import chain

import torch
from torch import Tensor, nn

from opensora_fast.cuda_graphs import (
    CudaRecorder,
    Graph,
    Recorder,
    Tensors,
    capture,
    copy_to_device,
    refuse_without_gpu,
)
from opensora_fast.model import STDiT2


class _Registered:
    """What is registered in the modules of a model, which is looked at in every call: of 28 blocks that takes 0.2 ms of
    a CPU. A walk over their 546 modules takes 0.8 ms, so it is taken once, and again where the modules are others.

    Args:
        model: as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = list(model.modules())
        # All of these see what is registered, replaced or removed later.
        self._children = [module._modules.values() for module in self._modules]
        self._tensors = [held.values() for module in self._modules for held in (module._parameters, module._buffers)]
        self._hooks = [
            hooks for module in self._modules for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._found = self._list_children()

    def _list_children(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(self._children))

    def is_outdated(self) -> bool:
        """Whether modules have come, gone or been replaced."""
        return self._list_children() != self._found

    def refuse_hooks(self) -> None:
        """ValueError if a module has a hook."""
        if not any(self._hooks):
            return
        hooked = next(module for module in self._modules if module._forward_hooks or module._forward_pre_hooks)
        raise ValueError(
            f"{type(hooked).__name__} has a hook, and a replayed CUDA graph calls none: remove it, or use "
            "cuda_graph_tokens=0"
        )

    def locate_tensors(self) -> tuple[tuple[int, torch.dtype], ...]:
        """Where parameters and buffers lie at the moment, and of which dtype they are."""
        tensors = chain.from_iterable(self._tensors)
        return tuple([(tensor.data_ptr(), tensor.dtype) for tensor in tensors if tensor is not None])


class ReplayedModel:
    """Called as the model, without gradients; its results are new tensors, not those of the graph.

    Args:
        model: in evaluation mode when called, on a GPU, outside of autocast. Computed by this process alone.
        tokens: calls on at most so many video tokens, both halves of guidance counted, are replayed.
        record: by default `CudaRecorder()`.

    Attributes:
        captured, replayed: graphs captured so far, and calls replayed.

    Raises:
        ValueError: the model is not on a GPU, and `record` is not given; of calls, also: the model is in training mode
            or not on the current GPU, it or a module inside has a hook, or autocast is on; `CaptureError` where
            memory runs out in a capture.
    """

    def __init__(self, model: STDiT2, tokens: int, record: Recorder | None = None) -> None:
        if record is None:
            refuse_without_gpu(tokens, model.device.type)
        self.model = model
        self.tokens = tokens
        self.captured = self.replayed = 0
        self._record = record or CudaRecorder()
        self._graph: Graph | None = None
        self._key: Hashable = None
        self._registered = _Registered(model)

    @property
    def y_embedder(self) -> nn.Module:
        """Samplers take the unconditional text from it."""
        return self.model.y_embedder

    @torch.inference_mode(False)  # so that a graph captured in it can be given inputs outside
    @torch.no_grad()
    def __call__(self, x: Tensor, timestep: Tensor, y: Tensor, **conditions: Tensor | None) -> Tensor:
        """See `STDiT2.forward`."""
        layout = self.model.get_layout([x])
        if layout.num_tokens > self.tokens:
            return self.model(x, timestep, y, **conditions)
        self._refuse_unlike()
        if conditions.get("mask") is None:
            # Of no mask the model would make one on the host, which a graph does not read.
            conditions["mask"] = torch.ones(len(y), y.shape[-2], dtype=torch.bool, device=self.model.device)
        inputs = {"x": x, "timestep": timestep, "y": y} | {
            name: value for name, value in conditions.items() if value is not None
        }
        key = self._make_key(inputs)
        if self._key != key:
            self._graph = self._key = None  # its memory serves the next one
            self._graph = capture(
                self._record, inputs, self.model.device, layout, lambda given: {"output": self.model(**given)}
            )
            self._key = key
            self.captured += 1
        copy_to_device(inputs, self.model.device, self._graph.inputs)
        self._graph.recording.replay_forward()
        self.replayed += 1
        return self._graph.recording.outputs["output"].clone()

    def _make_key(self, inputs: Tensors) -> Hashable:
        """Equal where a replay computes what the model would: shapes, and where and how its weights are read.

        Raises:
            ValueError: a module has a hook.
        """
        if self._registered.model is not self.model or self._registered.is_outdated():
            self._registered = _Registered(self.model)
        self._registered.refuse_hooks()
        shapes = tuple((name, value.dtype, value.shape) for name, value in sorted(inputs.items()))
        return shapes, self._registered.locate_tensors(), self.model.backends

    def _refuse_unlike(self) -> None:
        """ValueError where a graph would not compute what the model does."""
        device = self.model.device
        if isinstance(self._record, CudaRecorder):
            # Of what runs elsewhere a graph would hold nothing.
            refuse_without_gpu(self.tokens, device.type)
            if device.index != torch.cuda.current_device():
                raise ValueError(
                    f"the model is on {device}, and a CUDA graph holds what runs on the current GPU, "
                    f"cuda:{torch.cuda.current_device()}: call torch.cuda.set_device({device.index}) first"
                )
        if self.model.training:
            raise ValueError("the model is in training mode, and a CUDA graph drops no captions: call its eval() first")
        if torch.is_autocast_enabled(device.type):
            raise ValueError(
                "torch.autocast is on: a CUDA graph would go on to read the weights that it has cast, when they are "
                "gone; use a model that is cast itself, by its to(torch.bfloat16), or cuda_graph_tokens=0"
            )
