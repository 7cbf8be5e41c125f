"""The command `python -m accumexp.run`, and the life of a run from its specification to its summary."""
