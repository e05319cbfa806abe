"""The commands: `python -m finetune COMMAND`, and `train`, which `finetune/train.py` calls under the launcher.

A mistake of the user ends a command with one message on standard error and exit code 2; nothing else is caught.
What needs torch is imported by the command that needs it, once the recipe has been read, so that a mistake in a recipe
is told within a second.
"""

import argparse
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from finetune.cluster.gpus import gpus
from finetune.cluster.hostfile import describe, read_hostfile, run_on_hosts
from finetune.cluster.launcher import launcher_of
from finetune.cluster.slurm import task_environment
from finetune.plan.exchange import Links
from finetune.recipe.load import load_recipe
from finetune.recipe.messages import shown
from finetune.recipe.paths import expanded, path_problem, resolve
from finetune.recipe.recipe import Recipe
from finetune.run.failure import is_told, tell, told_by_every_host
from finetune.run.folder import (
    check_folder,
    finished_step,
    folder_of,
    is_complete,
    lost_checkpoint,
    recipe_of,
    run_of_step,
    stopped_step,
)
from finetune.run.place import hold

MOST_RANKS = 2**16
LARGEST = 1e12  # upper bound of options in GiB or Gbit/s
STOPPED = 3  # exit code of `finished` for a run that was asked to stop and has saved; used by launch.sh


class UsageError(ValueError):
    """Arguments that the command does not take."""


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are told like all others: in one sentence, by one rank."""

    def error(self, message: str) -> NoReturn:
        # argparse's message for `--recipe -x.yaml`, whose value it parses as another option.
        lacks_value = re.fullmatch(r"argument (-\S+): expected one argument", message)
        if lacks_value:
            message = f"{lacks_value[1]} needs a value; one that begins with '-' is written {lacks_value[1]}=VALUE"
        raise UsageError(f"{message}; see: {self.prog} --help")


def main(arguments: Sequence[str]) -> int:
    """Run one command; return its exit code."""
    try:
        _check_current_folder()
        options = _parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = options.command
        if command in (train, data, export, summary, replay):
            _name_accelerator()
            # Where it is installed, peft imports it, and it warns of 4-bit kernels that nothing here uses.
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        return command(options)
    except ValueError as error:
        if not is_told(error):
            raise
        tell(error)
        return 2
    except KeyboardInterrupt:
        print("nextune: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def train(options: argparse.Namespace) -> int:
    """Train the run of a recipe, or resume it. Started once on every rank."""
    launcher = launcher_of(os.environ)
    if launcher is not None:
        launcher.begin()
    os.environ.update(task_environment(os.environ))
    with told_by_every_host():
        recipe = _recipe(options)
    from finetune.commands.train import train_here

    return train_here(recipe, launcher)


def ranks(options: argparse.Namespace) -> int:
    """Print how many ranks to start on this machine."""
    recipe = _recipe(options)
    from finetune.commands.plan import print_ranks

    return print_ranks(recipe)


def plan(options: argparse.Namespace) -> int:
    """Print what the run will need: memory of each rank, disk, operations, time."""
    recipe = _recipe(options)
    from finetune.commands.plan import print_plan

    return print_plan(
        recipe,
        ranks=options.ranks,
        nodes=options.nodes,
        device_gib=options.device_gib,
        links=Links(node_gbit=options.node_gbit, network_gbit=options.network_gbit),
    )


def data(options: argparse.Namespace) -> int:
    """Print training sequences as the model sees them: tokens, what is supervised, where documents begin."""
    recipe = _recipe(options)
    from finetune.commands.data import show_data

    return show_data(recipe, options.show)


def finished(options: argparse.Namespace) -> int:
    """Print the run folder if the run is complete; otherwise exit code 3 if it stopped on request, else 1."""
    recipe = _recipe(options)
    folder = folder_of(recipe)
    check_folder(folder, recipe)
    if not is_complete(folder, recipe):
        step, stopped = finished_step(folder), stopped_step(folder)
        end = f"{recipe.train.epochs:g} epochs" if recipe.train.epochs else f"{recipe.train.steps}"
        if (lost := lost_checkpoint(folder)) is not None:
            print(lost, file=sys.stderr)
            return 1
        if stopped is not None:
            print(f"{folder}: stopped after step {stopped} of {end}, resumable", file=sys.stderr)
            print(folder)
            return STOPPED
        done = f"stands at step {step}" if step is not None else "has not finished"
        print(f"{folder}: {done} of {end}", file=sys.stderr)
        return 1
    print(folder)
    return 0


def rewind(options: argparse.Namespace) -> int:
    """Return to an earlier checkpoint of a run; later ones are set aside, nothing is deleted."""
    recipe_of(options.run)
    from finetune.run.starting_point import rewind as go_back

    held = hold(options.run)
    try:
        go_back(options.run, options.to, print)
    finally:
        held.release()
    print(f"{options.run}: the next start goes on from {options.to}")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write what a run trained as a folder that other tools load."""
    recipe_of(options.run)  # before imports of large libraries, so that a mistyped folder is reported immediately
    from finetune.commands.export import export_run

    return export_run(
        options.run,
        options.to,
        kind=options.format,
        which=options.checkpoint,
        base=options.base,
        **({"writer": options.written_by} if options.written_by else {}),
    )


def summary(options: argparse.Namespace) -> int:
    """Print what a run achieved and where its results are."""
    recipe_of(options.run)
    from finetune.commands.summary import print_summary

    return print_summary(options.run, options.model)


def replay(options: argparse.Namespace) -> int:
    """Repeat the forward pass of a step that was not finite, and print the loss of each of its sequences."""
    recipe_of(run_of_step(options.step))
    from finetune.commands.replay import replay as replay_step

    return replay_step(options.step, options.model)


def hosts(options: argparse.Namespace) -> int:
    """Print ranks, hosts, ranks on one host and the first host's address of a hostfile."""
    print(describe(read_hostfile(options.hostfile), options.node_rank))
    return 0


def across(options: argparse.Namespace) -> int:
    """Run a command on every host of a hostfile by ssh, and end it everywhere when it fails on one."""
    hosts = read_hostfile(options.hostfile)
    if not options.words:
        raise UsageError("across: names no command to run on the hosts; write it behind the hostfile")
    return run_on_hosts(hosts, options.words, os.environ)


def keys(_: argparse.Namespace) -> int:
    """Print every key of a recipe with its unit, default and meaning."""
    from finetune.recipe.load import explain

    print(explain())
    return 0


def _name_accelerator() -> None:
    """Spare the user DeepSpeed's warning that it found no GPU; that is what most machines with our tiny recipe are."""
    if not gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _check_current_folder() -> None:
    """Relative paths and libraries need one.

    Raises:
        UsageError: it was deleted while the shell stood in it.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError(f"the current folder cannot be used ({error.strerror}); cd to one that exists") from None


def _recipe(options: argparse.Namespace) -> Recipe:
    path = resolve(str(options.recipe)) or options.recipe
    return load_recipe(path, options.set)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m finetune", description="Fine-tune Qwen3-Next models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (train, ranks, plan, data, finished):
        sub = _add(commands, command)
        sub.add_argument("--recipe", type=_path, required=True, help="recipe file, from here or from the checkout")
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. optim.lr=1e-4")
        if command is train:
            sub.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # passed by the launcher
        if command is plan:
            _add_machine(sub)
        if command is data:
            sub.add_argument("--show", type=_count(), default=1, metavar="N", help="how many sequences")
    for command in (export, summary):
        sub = _add(commands, command)
        sub.add_argument("run", type=_path, metavar="RUN", help="run folder, such as runs/tiny")
        if command is export:
            sub.add_argument("--to", type=_path, required=True, metavar="DIR", help="folder to write; must not exist")
            sub.add_argument("--format", choices=("merged", "adapter"), required=True)
            sub.add_argument("--base", type=_path, metavar="DIR", help="the base weights, where they are elsewhere now")
            sub.add_argument("--written-by", help=argparse.SUPPRESS)  # launch.sh: replaces only its own exports
            sub.add_argument(
                "--checkpoint", type=_name, default="newest", metavar="WHICH", help="newest, best or step-N"
            )
        else:
            words = "a small merged export of the run; prints what it and the base write for two held-out rows"
            sub.add_argument("--model", type=_path, metavar="DIR", help=words)
    sub = _add(commands, rewind)
    sub.add_argument("run", type=_path, metavar="RUN", help="run folder, such as runs/tiny")
    sub.add_argument("--to", type=_name, required=True, metavar="WHICH", help="step-N or best")
    sub = _add(commands, replay)
    sub.add_argument("step", type=_path, metavar="STEP", help="folder that keeps it, such as runs/tiny/crash/step-40")
    sub.add_argument("--model", type=_path, metavar="DIR", help="weights, such as a merged export; the base without it")
    for command in (hosts, across):
        sub = _add(commands, command)
        sub.add_argument("hostfile", type=_path, metavar="HOSTFILE", help="lines of NAME slots=N")
        if command is hosts:
            sub.add_argument("--node-rank", type=_count(least=0), default=0, metavar="I", help="which host, from 0")
        else:
            sub.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND", help="and its arguments")
    _add(commands, keys)
    return parser


def _add_machine(sub: argparse.ArgumentParser) -> None:
    """The options of `plan` that describe another machine than this one."""
    sub.add_argument("--ranks", type=_count(most=MOST_RANKS), help="plan for so many ranks, not for this machine")
    sub.add_argument("--nodes", type=_count(most=MOST_RANKS), help="over how many machines the ranks are spread evenly")
    sub.add_argument(
        "--network-gbit",
        type=_positive,
        help="what the network of one machine carries each way, in Gbit/s over all its cards; gives the time"
        " of the exchange between machines",
    )
    sub.add_argument(
        "--node-gbit",
        type=_positive,
        help="what the links of one GPU to the others of its machine carry each way, in Gbit/s; NVLink of an"
        " H100 or H200 (3600) where there is one",
    )
    sub.add_argument("--device-gib", type=_positive, help="plan for GPUs with so much memory, not for this machine")


def _positive(text: str) -> float:
    value = _number(float, text)
    if not 0 < value < LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and below {LARGEST:g}")
    return value


def _count(least: int = 1, most: int | None = None) -> Callable[[str], int]:
    def count(text: str) -> int:
        value = int(_number(int, text))
        if value < least or (most is not None and value > most):
            limit = f"of at least {least}" if most is None else f"from {least} to {most:,}"
            raise argparse.ArgumentTypeError(f"{text} is not a whole number {limit}")
        return value

    return count


def _number(kind: type[int] | type[float], text: str) -> float:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{shown(text)} is not {what}") from None


def _name(text: str) -> str:
    return str(_path(text))


def _path(text: str) -> Path:
    problem = path_problem(text)
    if problem is not None:
        raise argparse.ArgumentTypeError(f"the path {shown(text)} {problem}")
    return expanded(text)


def _add(
    commands: "argparse._SubParsersAction[_Parser]", command: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    first = (command.__doc__ or "").splitlines()[0]
    sub = commands.add_parser(command.__name__, help=first, description=first)
    sub.set_defaults(command=command)
    return sub
