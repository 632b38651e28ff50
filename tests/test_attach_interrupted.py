"""`kimi-k26 attach`, interrupted: both states are known; each call that changes the folder fails once, then kills the process once."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_k26.cli import attach, main, switch

from .test_attach import MODEL, contents, hub_cache, published, read, snapshot

CALLS = ("replace", "symlink", "link", "unlink", "mkdir", "fsync", "chmod")


def failing_at(monkeypatch, calls: tuple[str, ...], number: int, fail) -> list:
    """Makes the `number`-th of these functions of `os` to be called do `fail` instead. Returns the calls so far."""
    seen = []
    for call in calls:
        real = getattr(os, call)

        def wrapped(*args, _real=real, **kwargs):
            seen.append(args)
            if len(seen) == number:
                fail()
            return _real(*args, **kwargs)

        monkeypatch.setattr(os, call, wrapped)
    return seen


def no_space():
    raise OSError(28, "No space left on device")


@pytest.mark.once
@pytest.mark.parametrize("make", [lambda path: published(path / "model"), hub_cache], ids=["files", "links"])
@pytest.mark.parametrize("action", [attach.attach, attach.undo])
def test_a_failing_call_leaves_the_old_state(tmp_path, few_files, make, action):
    base = tmp_path / "base"
    folder = make(base)
    if action is attach.undo:
        attach.attach(folder)
    # os.link and os.symlink may fail (`test_file_systems_without_links`).
    calls = tuple(call for call in CALLS if call not in ("link", "symlink"))
    number, met, outcomes = 0, True, []
    while met:
        number += 1
        run = tmp_path / f"run-{number}"
        shutil.copytree(base, run, symlinks=True)
        copy = run / folder.relative_to(base)
        before = snapshot(run)
        with pytest.MonkeyPatch.context() as patch:
            seen = failing_at(patch, calls, number, no_space)
            try:
                action(copy)
                outcomes.append("done")
            except OSError as error:
                assert error.errno == 28
                outcomes.append("refused")
        if outcomes[-1] == "refused":
            assert snapshot(run) == before, f"after call {number}: {seen[number - 1]}"
        met = len(seen) >= number
    assert outcomes[-1] == "done" and outcomes.count("refused") > 30


@pytest.mark.parametrize("missing", ["link", "symlink"])
def test_file_systems_without_links(tmp_path, monkeypatch, missing):
    folder = published(tmp_path / "model")
    before = snapshot(folder)

    def refuse(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, missing, refuse)
    attach.attach(folder)
    assert read(folder, "config.json")["auto_map"]["AutoModel"] == MODEL
    attach.undo(folder)
    assert snapshot(folder) == before


KILLER = """
import os, shutil, signal, sys
sys.path[:0] = sys.argv[5:]
from pathlib import Path
from kimi_k26.cli import attach, switch

folder, action, links = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
code = attach.code_files()
attach.code_files = lambda: {name: code[name] for name in sys.argv[4].split(",")}
changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.chmod"}

def without_links(*args, **kwargs):
    raise PermissionError(1, "Operation not permitted")

number, died = 0, True
while died:
    number += 1
    copy = folder.parent / f"{action}-{number}"
    shutil.copytree(folder, copy, symlinks=True)
    child = os.fork()
    if child == 0:
        seen = 0
        def hook(event, args):
            global seen
            if event in changes or (event == "open" and args[1] and set(args[1]) & set("wx")):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), 9)
        sys.addaudithook(hook)
        if links == "without":
            os.symlink = without_links
        getattr(attach, action)(copy)
        os._exit(0)
    died = os.WIFSIGNALED(os.waitpid(child, 0)[1])
print(number)
"""


@pytest.fixture
def few_files(monkeypatch) -> tuple[str, ...]:
    """Three code files stand for all, which saves time: one is new, one replaces another, one is the last."""
    names = ("configuration_kimi_k26.py", "tokenization_kimi.py", "modeling_kimi_k26.py")
    few = {name: data for name, data in attach.code_files().items() if name in names}
    monkeypatch.setattr(attach, "code_files", lambda: dict(few))
    return tuple(few)


def killed_everywhere(folder: Path, action: str, links: str = "with") -> list[Path]:
    """Copies of `folder`, on each of which `action` was killed before another one of its changes; the last finished."""
    paths = [str(Path(attach.__file__).parents[2]), *sys.path]
    command = [sys.executable, "-c", KILLER, str(folder), action, links, ",".join(attach.code_files()), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [folder.parent / f"{action}-{number}" for number in range(1, int(done.stdout) + 1)]


@pytest.mark.once
@pytest.mark.parametrize("action", ["attach", "undo"])
def test_killed_at_any_moment_it_shows_one_state_and_recovers(tmp_path, capsys, few_files, action):
    folder = published(tmp_path / "model")
    old, old_snapshot = contents(folder), snapshot(folder)
    attach.attach(folder)
    new = contents(folder)
    if action == "attach":
        shutil.copytree(folder, tmp_path / "attached")
        attach.undo(folder)
    copies = killed_everywhere(folder, action)
    assert len(copies) > 60
    first, last = (old, new) if action == "attach" else (new, old)
    shown = []
    for copy in copies:
        seen = contents(copy)
        assert seen in (first, last), f"{copy.name}: neither the old state nor the new"
        shown.append(seen == last)
        again = tmp_path / f"again-{copy.name}"
        shutil.copytree(copy, again, symlinks=True)
        assert main(["attach", str(again)]) == 0
        assert contents(again) == new
        assert not switch.unfinished(again)
        assert main(["attach", str(again), "--undo"]) == 0
        assert main(["attach", str(copy), "--undo"]) == 0
        for path in (again, copy):
            restored = snapshot(path)
            assert restored == old_snapshot, path.name
    assert shown == sorted(shown) and shown[0] is False and shown[-1] is True
    capsys.readouterr()


@pytest.mark.once
def test_killed_without_symbolic_links_it_recovers(tmp_path, capsys, few_files):
    folder = published(tmp_path / "model")
    old = contents(folder)
    for copy in killed_everywhere(folder, "attach", "without"):
        assert main(["attach", str(copy), "--undo"]) == 0
        assert contents(copy) == old
    capsys.readouterr()


@pytest.mark.once
def test_killed_in_a_hub_cache_it_shows_one_state(tmp_path, capsys, few_files):
    folder = hub_cache(tmp_path)
    old, links = contents(folder), {name: entry for name, entry in snapshot(folder).items() if entry[0] == "link"}
    attach.attach(folder)
    new = contents(folder)
    attach.undo(folder)
    for copy in killed_everywhere(folder, "attach"):
        assert contents(copy) in (old, new)
        assert main(["attach", str(copy), "--undo"]) == 0
        assert snapshot(copy) == links
    capsys.readouterr()


def test_a_signal_waits_for_the_change_to_end(tmp_path):
    folder = published(tmp_path / "model")
    done = []

    def writer(path: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        path.write_text("new")
        done.append(path)

    with pytest.raises(KeyboardInterrupt):
        switch.apply(folder, {"config.json": writer})
    assert done and (folder / "config.json").read_text() == "new" and not switch.unfinished(folder)
