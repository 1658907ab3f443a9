"""What a training step costs: operations, bytes, memory and time, counted or fitted to measured steps."""
