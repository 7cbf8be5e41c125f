"""The command `python -m accumexp.plan`: which micro-batches fit in memory, and what each of them costs."""
