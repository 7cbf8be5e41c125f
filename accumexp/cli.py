"""How commands start: arguments, Hydra, one line for each kind of bad input, exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.object_type import ObjectType
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from . import __version__
from .conf import conf_dir
from .config.explain import explain
from .environment.launch import RankError
from .environment.ranks import RankInfo, exit_immediately, skip_group_teardown
from .errors import TrainingError, UsageError, masked, print_error
from .sweeps.hydra_sweep import file_flags, runs_in_parallel

# Read before `hydra_app` sets it for Hydra, and handed on to the processes in which a launcher runs jobs.
WANTS_TRACEBACK = os.environ.get("ACCUMEXP_TRACEBACK", os.environ.get("HYDRA_FULL_ERROR")) == "1"

COMMANDS = ("run", "evaluate", "report", "prove", "plan", "audit")
COMPLETION = "-sc"  # Hydra's flag, which a shell gives

# With these a user's own files may set anything of Hydra's.
CONFIG_FLAGS = ("-c", "--config")

log = logging.getLogger(__name__)


def main() -> None:
    """The console command: `accumexp run ...` is `python -m accumexp.run ...`, and so are the others."""
    name, *arguments = sys.argv[1:] or ["--help"]
    completing = name == COMPLETION
    if completing:
        arguments, name = [name, *arguments], _completed_command(arguments)
        if not name:
            return
        arguments += _completed_files()
    usage = f"usage: accumexp {{{','.join(COMMANDS)}}} ..."
    if name in ("-h", "--help"):
        print(f"{usage}\n`accumexp run --help` has the help of a command")
        return
    if name == "--version":
        print(f"accumexp {__version__}")
        return
    if name not in COMMANDS:
        print(f"error: {name}: no such command\n{usage}", file=sys.stderr)
        sys.exit(2)
    sys.argv[1:] = arguments
    # For a shell the program's own name counts, for processes that are started the module's.
    with _current_folder_importable():
        runpy.run_module(f"accumexp.{name}", run_name="__main__", alter_sys=not completing)


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """Adds the current folder to `sys.path`, as `python -m` does unless it is started with `-P`."""
    before = list(sys.path)
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before


def _completed_files() -> list[str]:
    """The flags in the line that a shell completes which choose folders of configuration files that exist."""
    flags = file_flags(os.environ.get("COMP_LINE", "").split())
    return [one for one in flags if Path(one.partition("=")[2]).is_dir() or one.startswith("--config-name=")]


def _completed_command(arguments: list[str]) -> str:
    """The command whose arguments a shell completes, left out of the line that Hydra reads.

    Empty, after the names of the commands were printed, where the line has none yet. Hydra names the program
    for `accumexp -sc install=bash`.
    """
    if not arguments or not arguments[0].startswith("query="):
        return COMMANDS[0]
    program, *words = os.environ.get("COMP_LINE", "").split(" ")
    if words and words[0] in COMMANDS and len(words) > 1:
        os.environ["COMP_LINE"] = " ".join([program, *words[1:]])
        return words[0]
    print(" ".join(COMMANDS))
    return ""


def command_options(
    command_name: str, description: str, epilog: str, defaults: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Parses the `key=value` arguments of a command without Hydra, and answers `--help`.

    Returns:
        The values of the keys in `defaults`, and the other arguments.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m accumexp.{command_name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", metavar="key=value")
    options, others = dict(defaults), {}
    for argument in parser.parse_args().arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UsageError(f"{argument}: arguments are key=value, such as {next(iter(defaults))}=<path>")
        (options if key in options else others)[key] = value
    return options, others


def hydra_app(task: Callable[[Any], Any]) -> None:
    """Runs `task` under Hydra with `conf/config.yaml`; an error of composition becomes a `UsageError`."""
    import hydra

    variables = {"HYDRA_FULL_ERROR": "1", "ACCUMEXP_TRACEBACK": str(int(WANTS_TRACEBACK))}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    unusual = (*CONFIG_FLAGS, COMPLETION)
    own_files = any("hydra" in argument or argument.startswith(unusual) for argument in sys.argv[1:])
    try:
        with _jobs_composed_once(), nullcontext() if own_files else _composed_once():
            hydra.main(config_path=conf_dir(), config_name="config", version_base="1.3")(task)()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UsageError(explain(error)) from error
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _composed_once() -> Iterator[None]:
    """Leaves out two of Hydra's steps that no file of the project needs.

    Hydra composes the configuration a first time only to read `hydra.mode`, which takes 0.3 s, and for
    `--help` it copies all files that it has read for every group, which takes 1 s.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.hydra import Hydra

    get_mode = (Hydra, "get_mode", lambda self, config_name, overrides: None)
    with _replaced(get_mode, (ConfigLoaderImpl, "get_group_options", _group_options)):
        yield


@contextmanager
def _jobs_composed_once() -> Iterator[None]:
    """Runs a sweep's jobs with the configurations by which all of them were checked before the first.

    Hydra composes a job once to check it and again to run it, 0.1 s each. It keeps the configurations of
    the jobs that have run until the sweep's end, so that these need no more memory. A launcher that runs
    jobs in other processes composes them there.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.plugins.sweeper import Sweeper

    compose = ConfigLoaderImpl.load_sweep_config
    checked: dict[tuple[str, ...], list[Any]] = defaultdict(list)

    def check(sweeper: Any, batch: Sequence[Sequence[str]]) -> None:
        keep = not runs_in_parallel(sweeper.config.hydra.launcher)
        for overrides in batch:
            config = compose(sweeper.hydra_context.config_loader, sweeper.config, list(overrides))
            if keep:
                checked[tuple(overrides)].append(config)

    def take(loader: Any, master_config: Any, sweep_overrides: list[str]) -> Any:
        kept = checked[tuple(sweep_overrides)]
        return kept.pop() if kept else compose(loader, master_config, sweep_overrides)

    with _replaced(
        (Sweeper, "validate_batch_is_legal", check), (ConfigLoaderImpl, "load_sweep_config", take)
    ):
        yield


@contextmanager
def _replaced(*methods: tuple[type, str, Callable[..., Any]]) -> Iterator[None]:
    """Replaces methods, each given as (class, name, replacement), until the end."""
    with ExitStack() as restored:
        for owner, name, replacement in methods:
            restored.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield


def _group_options(loader: Any, group_name: str, results_filter: Any = ObjectType.CONFIG, *_: Any) -> Any:
    return loader.repository.get_group_options(group_name, results_filter)


def command(main: Callable[[], None]) -> NoReturn:
    """Runs a command's `main` and exits: 0, 2 with one line for bad input, 1 for a run that cannot go on.

    Where the reader of the output has ended, as `head` does, it ends without a word, with 1.
    """
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer is written when the interpreter ends.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        sys.exit(1)
    except (UsageError, TrainingError) as error:
        if WANTS_TRACEBACK:
            traceback.print_exc()
        sys.exit(print_error(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def log_error(error: Exception) -> None:
    """Writes the error to the run's log; prints the traceback of an unexpected one, or if it is wanted."""
    log.info("failed\n%s", masked("".join(traceback.format_exception(error))))
    if isinstance(error, RankError):
        print(masked(str(error)), file=sys.stderr)
    elif WANTS_TRACEBACK or not isinstance(error, UsageError | TrainingError):
        print(masked("".join(traceback.format_exception(error))), end="", file=sys.stderr)


def exit_with_error(error: Exception, rank_info: RankInfo, end_rank: bool = True) -> NoReturn:
    """Prints the error's line and exits with its code; with `end_rank`, without waiting for other ranks."""
    expected = isinstance(error, UsageError | TrainingError)
    code = print_error(error, "" if rank_info.first else f"rank {rank_info.rank}: ") if expected else 1
    if rank_info.size > 1:
        skip_group_teardown()
        if expected and not rank_info.first:
            # The launcher stops all ranks as soon as one ends: the first one prints and closes before.
            time.sleep(3)
        if end_rank:
            exit_immediately(code)
    sys.exit(code)
