"""How many graphs torch.compile makes of what the benchmarks compile."""

import torch


class Graphs:
    """A backend of torch.compile that counts."""

    def __init__(self, monkeypatch):
        self.count = 0
        compile_ = torch.compile

        def backend(module, inputs):
            self.count += 1
            return module

        monkeypatch.setattr(
            torch, "compile", lambda function, **options: compile_(function, **options, backend=backend, fullgraph=True)
        )
        torch._dynamo.reset()
