"""What a long run needs of the machine: processes, signals, its directory, checkpoints, logs."""
