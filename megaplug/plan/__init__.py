"""What a job will cost, worked out before it is queued."""
