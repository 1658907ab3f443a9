"""What stands in for CUDA graphs where there is no GPU."""

import math

import torch

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
