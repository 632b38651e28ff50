"""Replacing several files of a folder as if at once.

A reader must never see half a change, whenever the process dies. So both states of every file are first laid side by
side in a hidden sub-folder, `switch/old` and `switch/new`, with a link `switch/live` to one of them:

1. every file becomes a symbolic link to `switch/live/NAME`, which is still its old content;
2. one rename points `switch/live` at `new`: this is the moment of change, for all files together;
3. every link is replaced by the file itself, and `switch` is removed.

A file that a state lacks is a link to nothing meanwhile, which readers take for a missing file. What a dead process
left is finished (after step 2) or undone (before it) by `recover`. On a file system without symbolic links step 1 is
left out: files then change one by one, in the order given, and `recover` works all the same.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from . import CommandError

STATE_FOLDER = ".kimi-k26"

# What a name shall be: a file (by the function that writes it at a path where nothing is yet), a symbolic link (by its
# text), or nothing.
Entry = Callable[[Path], None] | str | None


def write_file(path: Path, data: bytes, mode: int | None = None) -> None:
    """Writes a new file and waits for the disk. `mode` is its permissions; None is what the umask leaves."""
    with open(path, "xb") as file:
        file.write(data)
        if mode is not None:
            os.chmod(path, mode)
        file.flush()
        os.fsync(file.fileno())


def copy_file(path: Path, source: Path) -> None:
    """Makes `path` another name of the file `source`, or a copy with the same mode and times."""
    try:
        os.link(source, path)
    except OSError:  # a file system without hard links, or a file of another owner
        shutil.copy2(source, path)


def check_name(name: str) -> None:
    """Refuses what is not the plain name of a file in the folder itself.

    Raises:
        ValueError: `name` leads elsewhere.
    """
    if name in ("", ".", "..", STATE_FOLDER) or any(mark in name for mark in "/\\\0"):
        raise ValueError(f"{name!r} is not a plain file name")


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Switch:
    """The hidden sub-folder of one change under way."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.state = folder / STATE_FOLDER
        if self.state.is_symlink():
            raise CommandError(f"{self.state} is a link; remove it first")
        self.work = self.state / "switch"
        self.live = self.work / "live"
        self.journal = self.state / "journal.json"

    def prepare(self, target: dict[str, Entry]) -> None:
        """Lays both states side by side. Nothing outside the hidden folder changes."""
        self.work.mkdir(parents=True)
        journal = {}
        for name, new in target.items():
            path = self.folder / name
            old = None
            if path.is_symlink():
                old = os.readlink(path)
            elif path.exists():
                old = functools.partial(copy_file, source=path)
            path.parent.mkdir(parents=True, exist_ok=True)
            journal[name] = {"old": self.lay("old", name, old), "new": self.lay("new", name, new)}
        for folder, _, _ in os.walk(self.work):
            _sync_folder(Path(folder))
        self.point("old")
        write_file(self.work / "journal.json", json.dumps(journal).encode())
        os.replace(self.work / "journal.json", self.journal)
        _sync_folder(self.state)

    def lay(self, side: str, name: str, entry: Entry) -> bool | str:
        """Puts one entry where readers find it by way of `live`. Returns what the journal says of it."""
        staged = self.work / side / name
        staged.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(entry, str):  # its text is relative to its own place, so readers are led there from here
            os.symlink(os.path.join((self.folder / name).parent, entry), staged)
            return entry
        if entry is not None:
            entry(staged)
        return entry is not None

    def point(self, side: str) -> None:
        """Says in one step which state holds: by a link, or by a text file where links cannot be made."""
        new = self.work / "live.new"
        new.unlink(missing_ok=True)
        try:
            os.symlink(side, new, target_is_directory=True)
        except (OSError, NotImplementedError):
            write_file(new, side.encode())
        os.replace(new, self.live)
        _sync_folder(self.work)

    def side(self) -> str:
        return os.readlink(self.live) if self.live.is_symlink() else self.live.read_text()

    def place_links(self) -> None:
        """Step 1. Every name keeps its old content, now by way of `live`."""
        if not self.live.is_symlink():
            return
        for name in self.read_journal():
            path = self.folder / name
            link = self.work / "link"
            link.unlink(missing_ok=True)
            os.symlink(os.path.relpath(self.live / name, path.parent), link)
            os.replace(link, path)
        _sync_folder(self.folder)

    def read_journal(self) -> dict[str, dict[str, bool | str]]:
        """By name, what each state has there. A checkpoint comes from elsewhere, and so may a journal in it."""
        try:
            journal = json.loads(self.journal.read_bytes())
            for name, states in journal.items():
                check_name(name.removeprefix(f"{STATE_FOLDER}/").removeprefix("original/"))
                if not all(isinstance(states[side], (bool, str)) for side in ("old", "new")):
                    raise ValueError(name)
            if self.side() not in ("old", "new"):
                raise ValueError("live")
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CommandError(f"{self.journal} was not written by this command ({error}); nothing was changed") from None
        return journal

    def settle(self) -> None:
        """Step 3. Every name becomes the file of the state that holds. May be repeated after any interruption."""
        side = self.side()
        for name, states in self.read_journal().items():
            path, state, staged = self.folder / name, states[side], self.work / side / name
            if state is False:
                path.unlink(missing_ok=True)
            elif state is True:
                if staged.exists():  # else an earlier attempt has moved it already
                    os.replace(staged, path)
            elif not (path.is_symlink() and os.readlink(path) == state):
                link = self.work / "link"
                link.unlink(missing_ok=True)
                os.symlink(state, link)
                os.replace(link, path)
        _sync_folder(self.folder)
        self.journal.unlink()
        self.clean()

    def clean(self) -> None:
        """Removes the work folder, and the hidden folder where nothing but empty folders is left in it."""
        shutil.rmtree(self.work, ignore_errors=True)
        for folder, _, _ in os.walk(self.state, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def unfinished(folder: Path) -> bool:
    """Whether an interrupted change left something for `recover`."""
    switch = _Switch(folder)
    if switch.journal.exists() or switch.work.exists():
        return True
    return switch.state.exists() and not any(path.is_file() for path in switch.state.rglob("*"))


def recover(folder: Path) -> str:
    """Finishes or undoes an interrupted change.

    Returns:
        "new" when it had taken effect and is now finished, "old" when it had not and is undone.
    """
    switch = _Switch(folder)
    with _signals_held():
        if not switch.journal.exists():  # it died before the first file was touched, or after the last
            switch.clean()
            return "old"
        side = switch.side()
        switch.settle()
        return side


def apply(folder: Path, target: dict[str, Entry]) -> None:
    """Brings several files to a new state, all or none.

    Args:
        folder: Where they are. A change left unfinished there must have been recovered.
        target: By path relative to `folder`, what shall be there.

    Raises:
        OSError: Something could not be written. The old state is back.
    """
    switch = _Switch(folder)
    with _signals_held():
        try:
            switch.prepare(target)
            switch.place_links()
            switch.point("new")
            switch.settle()
        except BaseException:
            if switch.journal.exists():
                switch.point("old")
                switch.settle()
            else:
                switch.clean()
            raise


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Keeps signals that would end the process waiting; a change takes milliseconds."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder against a second run of this command. The lock leaves no file and dies with the process.

    Raises:
        CommandError: Another run holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandError(f"{folder}: another run of this command is at work on this folder") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
