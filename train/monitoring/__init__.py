"""What a person sees of a run while it goes on: numbers, traces, what fills the memory, and what went wrong."""
