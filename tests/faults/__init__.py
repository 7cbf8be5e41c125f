"""Faults injected into real runs: `python -m tests.faults`. Its table is in docs/reliability.md."""
