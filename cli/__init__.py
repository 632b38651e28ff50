"""The `kimi-k26` command. Each subcommand is one module here, imported only when it is the one asked for."""

import argparse
import importlib
import os
import sys

COMMANDS = {
    "attach": "put this project's code into a downloaded checkpoint folder, or take it out again",
    "chat": "talk with a checkpoint in the terminal",
    "check": "judge every file of a checkpoint folder without loading it",
    "demo": "a small checkpoint answers about pictures, videos, numbers and tools",
    "quantize": "write a checkpoint with INT4 experts, or an INT4 one with plain weights",
    "serve": "answer many users at once over HTTP, as OpenAI's API does",
}
# Sampling as the model's makers recommend it; the temperature by whether the model thinks.
TEMPERATURE = {True: 1.0, False: 0.6}
TOP_P = 0.95


class CommandError(Exception):
    """Something the user can mend; its text is all that is shown."""


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: The words after the program's name; those of this process when None.

    Returns:
        The exit status: 0 done, 1 refused or failed, 130 interrupted. Wrong usage leaves through argparse with 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="kimi-k26", description="Tools for Kimi-K2.6 checkpoints.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == chosen:
            command = importlib.import_module(f".{name}", __name__)
            command.add_arguments(subparser)
    args = parser.parse_args(argv)
    try:
        return command.run(args)
    except BrokenPipeError:  # whoever read the output has seen enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CommandError, OSError) as error:
        print(f"kimi-k26 {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"kimi-k26 {args.command}: interrupted", file=sys.stderr)
        return 130
