"""The jobs of a sweep: their folders, their status, their parent run and the live view of all of them."""
