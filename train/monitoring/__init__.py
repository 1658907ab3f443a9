"""What a person sees of a run while it goes on: numbers, traces, and what fills the memory."""
