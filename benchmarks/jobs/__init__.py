"""What suites measure that is no provider's call: trainings that are compared, and coded clips."""
