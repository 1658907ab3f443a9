"""Checkpoints of a run: what is in them, how they are written while training goes on, and how a run starts from one."""
