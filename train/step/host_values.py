"""Reading numbers from a device without making it wait."""

import time

import torch

SECONDS_BETWEEN_QUERIES = 0.01


class HostValues:
    """Numbers computed on a device, on their way to the host.

    The copy is queued at once and waits for nothing; `get` waits for what was queued before the copy only. Asking for
    the loss after backward has been queued therefore costs the GPU nothing: it works on backward meanwhile.
    """

    def __init__(self, *values: torch.Tensor) -> None:
        stacked = torch.stack([value.detach().float().reshape(()) for value in values])
        self._event = None
        if stacked.is_cuda:
            self._host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            self._host.copy_(stacked, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = stacked

    def get(self, seconds: float | None = None) -> list[float]:
        """The numbers, waited for as long as it takes, or at most so many seconds: TimeoutError then."""
        if seconds is not None:
            self._wait(seconds)
        elif self._event is not None:
            self._event.synchronize()
        return self._host.tolist()

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._event is not None and not self._event.query():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the device has not computed it within {seconds} seconds")
            time.sleep(SECONDS_BETWEEN_QUERIES)
