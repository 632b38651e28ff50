"""`kimi-k26 chat FOLDER`: a dialogue in the terminal, or over pipes: each line of the input is a message or a command.

`Screen` is where answers appear, `Chat` reads the lines; what is said and read is kept by `Dialogue` (`dialogue.py`).
"""

import glob
import os
import sys
import unicodedata
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from . import TOP_P, CommandError
from .dialogue import THINKING, ChatError, Dialogue, Settings
from .loading import add_options, between, load_checkpoint, positive

try:
    import readline  # gives `input` its history and editing
except ImportError:  # Windows
    readline = None

PROMPT = "> "
CONTROLS = "Ctrl-C stops an answer, Ctrl-D at the prompt leaves."
HELP = f"""\
/image PATH         shows a picture with the next message; /video PATH a video
/think on|off|keep  think before answering, answer at once, or think and remember the thoughts of earlier answers
/fold on|off        thoughts pass by in one line, or stay; /unfold shows those of the last answer
/clear              forgets the dialogue; the system prompt stays
/help               this list
/quit               leaves
A line that ends in \\ goes on in the next; // at its beginning stands for a / that is no command.
{CONTROLS}"""

DIM, PLAIN, NEW_LINE = "\x1b[2m", "\x1b[0m", "\r\x1b[2K"
# What a model says must not move the cursor: on a terminal, control characters are shown as pictures of themselves.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
PICTURES |= {code: 0xFFFD for code in range(0x7F, 0xA0)} | {0x7F: 0x2421}


# -- the screen -------------------------------------------------------------------------------------------------------


class Screen:
    """Where answers appear: on a terminal with dim thoughts, elsewhere as text without any escape code.

    Args:
        out: a text stream.
        folds: thoughts pass by in one line on a terminal, and are left out elsewhere.
    """

    def __init__(self, out: TextIO, folds: bool = False):
        self.out, self.folds = out, folds
        self.is_terminal = out.isatty() and os.environ.get("TERM") != "dumb"
        self._part, self._thoughts, self._passing, self._in_line = "", "", False, False

    def begin(self, unread: int) -> None:
        """An answer begins, once so many tokens have been read."""
        self._part, self._thoughts = "", ""
        self._pass_by(f"reads {unread} tokens …")

    def show(self, delta: dict) -> None:
        """A piece of the answer."""
        if "reasoning" in delta:
            self._enter("reasoning")
            self._think(delta["reasoning"])
        if "content" in delta:
            self._enter("content")
            self._write(delta["content"])
        for part in delta.get("tool_calls", ()):
            self._enter("calls")
            if "id" in part:
                self._finish_line()
                self._write(f"[calls {part['function']['name']}] ")
            self._write(part["function"]["arguments"])

    def end(self) -> None:
        """The answer is over, or will not come."""
        self._wipe()
        self._enter("")

    def note(self, text: str) -> None:
        """A line that is not part of an answer. Nothing where there is no terminal."""
        if self.is_terminal:
            self._finish_line()
            self._write(f"{text}\n", dim=True)

    def thoughts(self, text: str) -> None:
        """Thoughts in full."""
        self._finish_line()
        self._write(f"{text}\n", dim=True)

    def _enter(self, part: str) -> None:
        if part == self._part:
            return
        self._wipe()
        if self._part == "reasoning":
            if self.is_terminal and self.folds:
                self._write(f"▸ {len(self._thoughts)} characters of thought; /unfold shows them\n", dim=True)
            elif self.is_terminal:
                self._finish_line()
            elif not self.folds:
                self._write("</think>\n")
        if part == "reasoning" and not (self.is_terminal or self.folds):
            self._write("<think>")
        if not part or self._part == "content":
            self._finish_line()
        self._part = part

    def _think(self, text: str) -> None:
        self._thoughts += text
        if not self.folds:
            self._write(text, dim=True)
        elif self.is_terminal:
            self._pass_by("▸ " + self._thoughts[-1024:].replace("\n", " "))

    def _write(self, text: str, dim: bool = False) -> None:
        if not text:
            return
        self._wipe()
        self._in_line = not text.endswith("\n")
        if self.is_terminal:
            text = text.translate(PICTURES)
            words = text.rstrip("\n")
            text = f"{DIM}{words}{PLAIN}{text[len(words):]}" if dim and words else text
        self.out.write(text)
        self.out.flush()

    def _finish_line(self) -> None:
        if self._in_line:
            self._write("\n")

    def _pass_by(self, text: str) -> None:
        """The end of a text in a line that the next writing takes away."""
        if self.is_terminal:
            try:
                columns = os.get_terminal_size(self.out.fileno()).columns or 80
            except OSError:
                columns = 80
            self.out.write(f"{NEW_LINE}{DIM}{last_of(text.translate(PICTURES), columns - 1)}{PLAIN}")
            self.out.flush()
            self._passing = True

    def _wipe(self) -> None:
        if self._passing:
            self._passing = False
            self.out.write(NEW_LINE)


def last_of(text: str, columns: int) -> str:
    """The first two characters of a text and as much of its end as there are columns for; `…` stands for the rest."""
    text = text.replace("\t", " ")
    widths = [0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text]
    if sum(widths) <= columns:
        return text
    room, place = columns - sum(widths[:2]) - 1, len(text)
    while place > 2 and widths[place - 1] <= room:
        place -= 1
        room -= widths[place]
    return f"{text[:2]}…{text[place:]}"


# -- lines and commands -----------------------------------------------------------------------------------------------


class Chat:
    """Reads lines and does what they say, until the input ends.

    Args:
        source: where lines come from.
        errors: where errors go.
    """

    def __init__(self, dialogue: Dialogue, screen: Screen, source: TextIO, errors: TextIO):
        self.dialogue, self.screen, self.source, self.errors = dialogue, screen, source, errors
        self.is_typed = source.isatty()
        self.failed = False
        self._last_thoughts = ""

    def run(self) -> int:
        """The exit status: 1 where a line of an input that nobody types could not be answered, else 0."""
        while True:
            try:
                line = self.read()
                if line is None or line.strip() in ("/quit", "/exit"):
                    break
                self.take(line)
            except KeyboardInterrupt:
                if not self.is_typed:
                    raise
                self.screen.end()
                self.screen.note("\n" + CONTROLS)
        return int(self.failed and not self.is_typed)

    def read(self) -> str | None:
        """The next message or command; None at the end."""
        lines = []
        while not lines or lines[-1].endswith("\\"):
            try:
                lines.append(self._read_line())
            except EOFError:
                if self.is_typed and not lines:
                    self.screen.note("")
                if not lines:
                    return None
                break
        return "\n".join([*(line[:-1] for line in lines[:-1]), lines[-1]])

    def _read_line(self) -> str:
        if self.is_typed and self.source is sys.stdin and self.screen.is_terminal:
            return input(PROMPT)
        if self.is_typed:
            self.errors.write(PROMPT)
            self.errors.flush()
        line = self.source.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def take(self, line: str) -> None:
        """One line. What goes wrong with it is said, and the dialogue goes on."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._command(*line[1:].split(None, 1))
            elif line.strip():
                self._ask(line.removeprefix("/"))
        except BrokenPipeError:  # nobody reads the answers any more
            raise
        except Exception as error:  # a dialogue is worth more than a clean end
            self.failed = True
            self.screen.end()
            kind = "" if isinstance(error, ChatError) else f"{type(error).__name__}: "
            print(f"error: {kind}{error}", file=self.errors, flush=True)

    def _ask(self, text: str) -> None:
        pictures = len(self.dialogue.waiting)
        answer = self.dialogue.ask(text, self.screen)
        self.screen.end()
        self._last_thoughts = answer.reply["reasoning"]
        if answer.ending == "whole":
            rate = answer.said / max(answer.seconds, 1e-9)
            self.screen.note(f"{answer.said} tokens, {rate:.1f} a second; {answer.known} of {answer.prompt} were known")
            return
        ending = "stopped" if answer.ending == "stopped" else f"cut off after {answer.said} tokens"
        if answer.kept:
            ending += "; what was said is kept"
        else:
            ending += " before it said anything: the message is not kept"
            ending += ", its pictures and videos wait for the next" if pictures else ""
        self.failed = self.failed or answer.ending == "length" and not answer.kept
        print(f"[{ending}]", file=self.errors, flush=True)

    def _command(self, name: str = "", rest: str = "") -> None:
        rest = rest.strip()
        if name in ("image", "video"):
            if not rest:
                raise ChatError(f"/{name} needs the path of a file")
            tokens = self.dialogue.attach(name, rest)
            self.screen.note(f"{rest}: {tokens} tokens, to go with the next message")
        elif name == "think":
            self.dialogue.think = one_of(name, rest, THINKING)
            self.screen.note(f"thinking: {rest}")
        elif name == "fold":
            self.screen.folds = one_of(name, rest, ("on", "off")) == "on"
            self.screen.note(f"folding: {rest}")
        elif rest:
            raise ChatError(f"/{name} takes nothing after it" if name in COMMANDS else unknown(name))
        elif name == "unfold":
            self.screen.thoughts(self._last_thoughts or "(there were no thoughts)")
        elif name == "clear":
            self.dialogue.clear()
            self._last_thoughts = ""
            self.screen.note("cleared")
        elif name == "help":
            print(HELP, file=self.screen.out, flush=True)
        else:
            raise ChatError(unknown(name))


COMMANDS = ("image", "video", "think", "fold", "unfold", "clear", "help", "quit", "exit")


def one_of(command: str, given: str, allowed) -> str:
    if given not in allowed:
        raise ChatError(f"/{command} is one of {', '.join(allowed)}, not {given!r}")
    return given


def unknown(name: str) -> str:
    return f"there is no command /{name}; /help lists them, and // at the beginning sends the line as it is"


def completions(line: str) -> list[str]:
    """Lines that this one may become: commands, and files for those that take one."""
    command, space, path = line.partition(" ")
    if not space:
        return [f"/{name} " for name in COMMANDS if line and f"/{name}".startswith(line)]
    if command not in ("/image", "/video"):
        return []
    start = os.path.expanduser(path)
    found = sorted(glob.glob(glob.escape(start) + "*"))
    return [f"{command} {name}" + "/" * os.path.isdir(name) for name in found]


@contextmanager
def editing(history: Path | None):
    """Lines that are typed can be edited, completed and called back, those of earlier runs too with `history`."""
    if readline is None:
        yield
        return

    def complete(line: str, number: int) -> str | None:
        return dict(enumerate(completions(line))).get(number)

    readline.set_completer_delims("")
    readline.set_completer(complete)
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    readline.set_history_length(1000)
    if history is not None and history.exists():
        readline.read_history_file(history)
    try:
        yield
    finally:
        if history is not None:
            readline.write_history_file(history)


# -- the command ------------------------------------------------------------------------------------------------------


def add_arguments(parser) -> None:
    parser.add_argument("folder", type=Path, help="a checkpoint")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--think", choices=tuple(THINKING), default="on", help="see /think (%(default)s)")
    parser.add_argument("--fold", action="store_true", help="thoughts take one line; none without a terminal")
    parser.add_argument("--history", type=Path, metavar="FILE", help="keep typed lines there for the next time")
    group = parser.add_argument_group("answers")
    group.add_argument("--max-new-tokens", type=positive, default=32768, metavar="N", help="of an answer (%(default)s)")
    group.add_argument("--temperature", type=between(0, 100), metavar="T", help="0 is greedy; 1.0, 0.6 without thinking")
    group.add_argument("--top-p", type=between(1e-6, 1), default=TOP_P, metavar="P", help="(%(default)s)")
    group.add_argument("--seed", type=between(-(2**63), 2**63 - 1, int), help="of what is sampled")
    add_options(parser)


def run(args) -> int:
    if sys.stdin is None:
        raise CommandError("there is no standard input to read messages from")
    dialogue = load(args)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="replace")  # a byte that is no text is no reason to stop
    screen = Screen(sys.stdout, args.fold)
    chat = Chat(dialogue, screen, sys.stdin, sys.stderr)
    if chat.is_typed:
        screen.note(f"{args.folder}: thinking {args.think}. /help lists commands. {CONTROLS}")
    try:
        with editing(args.history if chat.is_typed else None):
            return chat.run()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return 1


def load(args) -> Dialogue:
    """The checkpoint of `args.folder`, ready to talk."""
    import torch
    from transformers import logging

    if args.seed is not None:
        torch.manual_seed(args.seed)
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    processor, model = load_checkpoint(args.folder, args.dtype, args.memory, args.expert_budget, args.threads)
    settings = Settings(args.max_new_tokens, args.temperature, args.top_p)
    return Dialogue(model, processor, settings, args.system, args.think)
