"""Other people's trainers, unmodified, held against the larger batch."""
