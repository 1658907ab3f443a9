"""One step: what it draws, its losses and gradients, as they come or by replaying CUDA graphs."""
