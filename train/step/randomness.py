"""All randomness of a training step, from (seed, step, replica) alone.

Nothing is carried from step to step, so a run that is stopped and resumed at any step draws what it would have drawn.
Which clips a step sees and where a clip starts is decided by the sampler and the loader, from the seed as well.
"""

import numpy as np
import torch


def seed_step(seed: int, step: int, replica: int = 0) -> None:
    """Seed torch's generators for one step: latents, masks, timesteps, noise and dropped captions are drawn from them.

    Args:
        seed: seed of the run.
        step: number of the step, from 1.
        replica: number of the micro-batch among those of the step; for each its own are drawn.
    """
    words = np.random.SeedSequence((seed, step, replica)).generate_state(2, np.uint32)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
