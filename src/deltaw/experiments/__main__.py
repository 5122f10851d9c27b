"""python -m deltaw.experiments list | run NAME [NAME …] | all"""

import argparse
import sys
import time

from .. import results
from . import NAMES, experiment
from .engine import harness


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, also for what `--minutes` left incomplete; 2 for what is refused; 130 if interrupted."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "list":
        for name in NAMES:
            print(_line(name))
        return 0
    began = time.monotonic()
    try:
        for name in NAMES if arguments.command == "all" else dict.fromkeys(arguments.names):
            left = arguments.minutes
            if left is not None:  # for all of them together
                left = max(left - (time.monotonic() - began) / 60, 0)
            harness.run(name, quick=arguments.quick, device=arguments.device, out=arguments.out, minutes=left)
    except harness.Refused as error:
        print(f"error: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


def _line(name: str) -> str:
    module = experiment(name)
    question = (module.__doc__ or "").strip().partition("\n")[0]
    shipped = "recorded" if name in results.names() else "not recorded"
    return f"{name:{max(map(len, NAMES))}}  {question}  [{len(module.cells(module.Settings()))} cells, {shipped}]"


def minutes(text: str) -> float:
    """For argparse, which names this function in its message."""
    if not float(text) >= 0:
        raise ValueError
    return float(text)


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    options.add_argument("--quick", action="store_true", help="the same code, small: under a minute on two CPU cores")
    options.add_argument("--out", default="results", metavar="DIR", help="the folder of the records (default: results)")
    options.add_argument("--minutes", type=minutes, metavar="M", help="begin no cell after M minutes; run again to go on")
    parser = argparse.ArgumentParser(prog="python -m deltaw.experiments", description="Run the book's experiments.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is: name, question, number of cells, whether a record is shipped")
    run = commands.add_parser("run", parents=[options], help="run experiments, or go on with them")
    run.add_argument("names", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    commands.add_parser("all", parents=[options], help="run them all")
    return parser


if __name__ == "__main__":
    sys.exit(main())
