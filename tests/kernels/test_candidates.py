"""Every candidate of attention's kernels is as accurate as the default must be: a tuner may choose any of them.

Without a GPU they run on the emulator, four minutes of CPU time:

    cd tests/kernels; TRITON_INTERPRET=0 PYTHONPATH=. python -m pytest -p ptx_emulator.plugin -n 2 test_candidates.py
"""

from collections.abc import Iterator
from functools import partial

import pytest
import test_cross_attention
import test_spatial_attention
import test_temporal_attention
import torch

from opensora_fast.kernels.compilation import modules_with
from opensora_fast.kernels.configurations import Configuration, force, record_selections

# The longest small and medium frame that make the frames below one class.
FRAME_LIMITS = {"small": (1000, 1000), "medium": (0, 1000), "large": (0, 0), "any": (0, 1000)}
FRAMES = [(1, 10, 14), (1, 1, 5)]
# Videos whose frames lie in tiles of so many rows, the last ones in none.
VIDEOS = {
    "16 rows": [(16, 1, 2), (5, 1, 4)],
    "32 rows": [(17, 1, 3)],
    "64 rows": [(40, 1, 2)],
    "128 rows": [(100, 1, 1)],
    "half": [(140, 1, 1)],
}
TEXT_LENGTHS = {"text of one tile": [120, 7], "text of two tiles": [200, 30], "any": [300, 30]}


def list_candidates() -> Iterator[tuple[str, str, Configuration]]:
    for module in modules_with("CONFIGURATIONS"):
        if module.__name__.startswith("opensora_fast.kernels.attention."):
            for kernel, classes in module.CONFIGURATIONS.items():
                for shape_class, candidates in classes.items():
                    if "@" not in shape_class and shape_class != "float32":
                        yield from ((kernel, shape_class, candidate) for candidate in candidates)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "shape_class", "candidate"), list(list_candidates()), ids=str)
def test_a_candidate(kernel, shape_class, candidate, device, compare_with_eager, monkeypatch) -> None:
    if kernel.startswith("spatial_attention"):
        module = test_spatial_attention
        for name, longest in zip(("SMALL", "MEDIUM"), FRAME_LIMITS[shape_class], strict=True):
            limit = f"opensora_fast.kernels.attention.spatial_forward.LONGEST_{name}_FRAME"
            monkeypatch.setattr(limit, longest)
        inputs = module.make_inputs(FRAMES, torch.bfloat16, device)
    elif kernel.startswith("temporal_attention"):
        module = test_temporal_attention
        inputs = module.make_inputs(VIDEOS[shape_class], torch.bfloat16, device)
    else:
        module = test_cross_attention
        inputs = module.make_inputs([(1, 9, 10), (1, 5, 8)], TEXT_LENGTHS[shape_class], torch.bfloat16, device)
    tables = {name: inputs.pop(name) for name in ("layout", "text", "cos", "sin") if name in inputs}
    with force(kernel, shape_class, candidate), record_selections() as selected:
        compare_with_eager(partial(module.ours, **tables), partial(module.reference, **tables), inputs)
    assert (kernel, shape_class) in selected, "these inputs do not take it"
