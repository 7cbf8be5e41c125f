"""Faults of machines, found in recordings of their sensors."""
