"""What a person sees of a run: progress, logs, curves and pictures."""
