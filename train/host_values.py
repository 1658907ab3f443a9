"""Reading numbers from a device without making it wait."""

import torch


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

    def get(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
