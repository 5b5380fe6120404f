"""What a run writes and reads again: its folder, logs, checkpoints and lineage."""
