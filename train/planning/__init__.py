"""What a run will cost, before it starts: memory, time, and the waiting of processes for each other."""
