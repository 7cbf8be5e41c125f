"""`python -m accumexp.run`: compose, train, evaluate, checkpoint, log."""

from ..cli import command
from .command import main  # a module of its own, so that jobs in other processes find `task` by its name

if __name__ == "__main__":
    command(main)
