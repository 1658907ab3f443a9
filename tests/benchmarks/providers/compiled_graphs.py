"""How many graphs torch.compile makes of what the benchmarks compile."""

import torch


class Graphs:
    """A backend of torch.compile that counts, and keeps the options of each graph."""

    def __init__(self, monkeypatch):
        self.options = []
        compile_ = torch.compile

        def backend(module, inputs, options=None):
            self.options.append(options)
            return module

        monkeypatch.setattr(
            torch,
            "compile",
            lambda function, **options: compile_(function, **options | {"backend": backend, "fullgraph": True}),
        )
        torch._dynamo.reset()

    @property
    def count(self) -> int:
        return len(self.options)
