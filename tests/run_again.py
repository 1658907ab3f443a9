"""What stands in for CUDA graphs where there is no GPU."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opensora_fast.cuda_graphs import Recording


class RunAgain:
    """Records by running, and replays by running again, into the tensors of the recording.

    As with a capture, the recording itself gives no numbers, and recording and replays must not draw any at random.
    """

    def __init__(self):
        self.replays = 0

    def __call__(self, forward, backward=None):
        latest = []

        def run_forward():
            state = torch.get_rng_state()
            latest[:] = [forward()]
            assert torch.equal(torch.get_rng_state(), state), "a replay would draw the same numbers again"

        def replay_forward():
            self.replays += 1
            run_forward()
            for name, output in static.items():
                output.copy_(latest[0][name].detach())

        def replay_backward():
            backward(latest.pop())

        run_forward()
        static = {name: torch.full_like(output.detach(), math.nan) for name, output in latest[0].items()}
        if backward is None:
            return Recording(static, replay_forward)
        replay_backward()
        return Recording(static, replay_forward, replay_backward)


class _MetaOnly(TorchDispatchMode):
    """Refuses tensors of the host, which a graph could not read again. Of the meta device no values can be read. An
    empty one holds nothing to read: torch 2.11 makes one where a block is recomputed."""

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        results = op(*arguments, **(options or {}))
        for tensor in tree_leaves((arguments, options, results)):
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                assert tensor.is_meta, f"{op} of {tensor.device}"
        return results


def record_on_meta(monkeypatch, model, latents):
    """Moves a model to the meta device, in the place of a GPU, and returns a recorder: it runs twice, as `CudaRecorder`
    does, and what needs the host the second time, which is the capture, is an error. Its replays do nothing.

    Args:
        latents: like those of the steps or calls. Their layout is there before anything is recorded.
    """
    # Autocast does not know that device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    model.to("meta")
    layout = model.get_layout([latents])
    monkeypatch.setattr(model, "get_layout", lambda batches: layout)

    def record(forward, backward=None):
        def run():
            outputs = forward()
            if backward is not None:
                backward(outputs)
            return {name: output.detach() for name, output in outputs.items()}

        run()
        with _MetaOnly():
            outputs = run()
        return Recording(outputs, lambda: None, lambda: None)

    return record
