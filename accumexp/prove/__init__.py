"""The command `python -m accumexp.prove`: the certificate of an experiment."""
