"""The command `kimi-k26 serve`: a process of its own, and what it refuses."""

import signal
import socket
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="the server takes the extra `serve`")

from kimi_k26.cli import CommandError, main
from kimi_k26.cli.serve import read_keys
from kimi_k26.tests.serving import Served, chunks_of


def test_the_command(tiny_checkpoint):
    """A process of its own: it serves the folder, and stops when it is told to, with the stream at work brought to an end."""
    with Served(tiny_checkpoint, "--grace", "0.2") as server:
        connection, answer = server.open_stream("Hi", model="kimi", logit_bias={"1": 100})
        answer.readline()
        server.process.send_signal(signal.SIGTERM)
        *_, last = chunks_of(answer)
        assert last["error"]["code"] == "stopping"
        connection.close()


@pytest.mark.parametrize("words, says", [(["--max-running", "0"], "--max-running"), (["--max-body", "big"], "64MiB"), ([], "no")])
def test_the_command_refuses(tiny_checkpoint, capsys, tmp_path, words, says):
    folder = tiny_checkpoint if words else tmp_path / "no"
    assert main(["serve", str(folder), "--port", "0", *words]) == 1
    assert says in capsys.readouterr().err


def test_missing_packages_are_named(tiny_checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert main(["serve", str(tiny_checkpoint)]) == 1
    assert "needs llguidance: pip install 'kimi-k26[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, value",
    [("--port", "99999"), ("--port", "-1"), ("--timeout", "-5"), ("--timeout", "nan"), ("--max-media", "-1"), ("--grace", "-3"),
     ("--max-video-seconds", "0"), ("--dtype", "int8"), ("--dtype", "banana")],
)  # fmt: skip
def test_options_that_make_no_server(option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["serve", "nowhere", f"{option}={value}"])
    assert stop.value.code == 2 and f"argument {option}: " in (said := capsys.readouterr().err) and value in said


@pytest.mark.parametrize(
    "data, keys", [(b"one\n\n two \r\nthree", ("one", "two", "three")), (b"\xef\xbb\xbfone\n", ("one",)), (b"one # mine\n", "line 1"), (b"\xff\xfe", "UTF-8"), (b"\n", "no API key")]
)
def test_keys_of_a_file(data, keys, tmp_path):
    (tmp_path / "keys").write_bytes(data)
    args = SimpleNamespace(api_key=[], api_key_file=tmp_path / "keys")
    if isinstance(keys, tuple):
        assert read_keys(args) == keys
    else:
        with pytest.raises(CommandError, match=keys):
            read_keys(args)


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(tmp_path / "nowhere"), "--port", str(taken.getsockname()[1])]) == 1
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err
