"""The process a command runs in: its device, ranks, random state, signals and console."""
