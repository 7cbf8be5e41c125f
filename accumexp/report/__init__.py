"""The command `python -m accumexp.report`: a sweep's table, statistics, pictures and page."""
