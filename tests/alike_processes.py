"""What stands in for several processes where one is enough: all of them have the same gradients."""

import torch

from opensora_fast.parallel.processes import Processes


class AlikeProcesses(Processes):
    """One of `world_size` processes; holds and frees the tensors that a joined one does on a GPU."""

    def __init__(self, rank, world_size, device="cpu"):
        super().__init__(torch.device(device))
        self.rank = rank
        self.world_size = world_size

    def average(self, gradient):
        total = gradient.view(self.world_size, -1)[self.rank] * self.world_size
        return lambda: total.float() / self.world_size

    def join_norms(self, norms):
        return torch.linalg.vector_norm(torch.stack(norms))
