"""`kimi-k26 chat`: dialogues with a small checkpoint in this process; the command itself in a terminal and over pipes."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from contextlib import contextmanager, suppress

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from kimi_k26 import KimiK26ForConditionalGeneration, KimiK26Processor
from kimi_k26.cli import main
from kimi_k26.cli.chat import HELP, Chat, Screen, completions, editing, last_of
from kimi_k26.cli.dialogue import ChatError, Dialogue, Settings, find
from kimi_k26.tests.media_samples import make_video

ESCAPE = "\x1b"


@pytest.fixture(scope="module")
def endless(tiny_checkpoint, tmp_path_factory):
    """A checkpoint that says words and no control tokens when it is greedy: it ends no answer by itself."""
    folder = tmp_path_factory.mktemp("chat") / "endless"
    shutil.copytree(tiny_checkpoint, folder)
    index, head = json.loads((folder / "model.safetensors.index.json").read_text()), "language_model.lm_head.weight"
    name = index["weight_map"][head]
    weights = load_file(folder / name)
    weights[head][-256:] = 0  # some word is always likelier than nothing
    save_file(weights, folder / name, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def parts(endless):
    model = KimiK26ForConditionalGeneration.from_pretrained(endless, dtype=torch.float32).eval()
    return model, KimiK26Processor.from_pretrained(endless)


class Lips:
    """Makes the model of a dialogue say what a test wants, and keeps what it would have said.

    logits: for each step the logits `(vocabulary,)` as they were.
    """

    def __init__(self, model, tokenizer):
        self.tokenizer, self.words, self.logits, self.fails = tokenizer, [], [], False
        self.hook = model.register_forward_hook(self.step)

    def say(self, text: str, end: bool = True):
        self.words = self.tokenizer.encode(text) + self.tokenizer.encode("<|im_end|>") * end
        self.logits.clear()

    def step(self, model, args, output):
        if self.fails:
            raise RuntimeError("the weights have gone")
        self.logits.append(output.logits[0, -1].clone())
        if self.words:
            output.logits[:, -1] = 0
            output.logits[:, -1, self.words.pop(0)] = 100


class Paper:
    """Shows nothing, and does something with each delta."""

    def __init__(self, then=lambda delta: None):
        self.unread, self.then = [], then

    def begin(self, unread):
        self.unread.append(unread)

    def show(self, delta):
        self.then(delta)


@pytest.fixture
def dialogue(parts):
    model, processor = parts
    talk = Dialogue(model, processor, Settings(max_new_tokens=24, temperature=0.0), think="off")
    talk.lips = Lips(model, processor.tokenizer)
    yield talk
    talk.lips.hook.remove()
    for module in model.modules():
        module._forward_pre_hooks.clear()


@pytest.fixture
def picture(tmp_path):
    Image.linear_gradient("L").resize((60, 50)).save(tmp_path / "grey.png")
    return tmp_path / "grey.png"


def ask(dialogue, text, reply=None, paper=None):
    if reply is not None:
        dialogue.lips.say(reply)
    return dialogue.ask(text, paper or Paper())


def check_cache(dialogue, text, reply, **flags):
    """One more turn, whose first logits must be those of the whole prompt read anew."""
    content = [*dialogue.waiting, {"type": "text", "text": text}] if dialogue.waiting else text
    message = {"role": "user", "content": content}
    answer = ask(dialogue, text, reply)
    first = dialogue.lips.logits[0]
    inputs = dialogue._inputs([*dialogue.messages[:-2], message], **{"thinking": False, **flags})
    with torch.no_grad():
        whole = dialogue.model(**inputs, use_cache=False).logits[0, -1]
    assert answer.prompt == inputs["input_ids"].shape[1]
    assert torch.allclose(first, dialogue.lips.logits[-1], atol=1e-4) and torch.equal(whole, dialogue.lips.logits[-1])
    return answer


# -- the dialogue -----------------------------------------------------------------------------------------------------


def test_each_turn_reads_only_what_is_new(dialogue, picture, tmp_path):
    seen = []
    hook = dialogue.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[1])))
    (tmp_path / "film.mp4").write_bytes(make_video(frames=20))
    first = check_cache(dialogue, "Hello.", "Hello there.")
    assert first.known == 0 and first.ending == "whole" and first.reply["content"] == "Hello there."
    seen.clear()
    pictured = dialogue.attach("image", str(picture))
    picture.unlink()  # what was shown stays shown
    second = check_cache(dialogue, "What is it?", "It is grey.")
    assert second.known == first.prompt + first.said - 1
    clips = dialogue.attach("video", str(tmp_path / "film.mp4"))
    third = check_cache(dialogue, "And this?", "It moves.")
    assert third.known == second.prompt + second.said - 1
    fourth = check_cache(dialogue, "Thank you.", "You are welcome.")
    assert fourth.known == third.prompt + third.said - 1
    assert pictured == 6 and clips > 0
    films = seen[2]
    # Each is encoded in its own turn; what follows them is the check, which reads all of them again.
    assert seen == [1, 1, films, 1 + films, 1 + films] and films >= 1
    hook.remove()


def test_thoughts_of_earlier_answers_are_forgotten_or_kept(dialogue):
    dialogue.think = "on"
    first = ask(dialogue, "Hello.", "They greet me.</think>Hello.")
    assert first.reply["reasoning"] == "They greet me." and first.reply["content"] == "Hello."
    second = check_cache(dialogue, "Again.", "Once more.</think>Hello again.", thinking=True)
    assert second.known == first.prompt  # up to the thoughts, which have gone
    dialogue.think = "keep"
    third = check_cache(dialogue, "Go on.", "Well.</think>So be it.", thinking=True, preserve_thinking=True)
    assert third.known == first.prompt
    fourth = check_cache(dialogue, "And?", "Hm.</think>Done.", thinking=True, preserve_thinking=True)
    assert fourth.known == third.prompt + third.said - 1
    assert [message.get("reasoning") for message in dialogue.messages[1::2]] == [
        "They greet me.",
        "Once more.",
        "Well.",
        "Hm.",
    ]


def test_system_prompt_survives_clearing(parts):
    talk = Dialogue(*parts, Settings(4, 0.0), system="You are Kimi.", think="off")
    ask(talk, "Hello.")
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    talk.clear()
    assert talk.messages == [{"role": "system", "content": "You are Kimi."}] and ask(talk, "Hello.").known == 0


def test_answers_are_sampled_unless_the_temperature_is_zero(parts):
    talk, said = Dialogue(*parts, Settings(8), think="off"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        talk.clear()
        said.append(ask(talk, "Hello.").reply["content"])
    assert said[0] == said[1] != said[2]
    assert [talk._choice()["temperature"] for talk.think in ("on", "off", "keep")] == [1.0, 0.6, 1.0]
    assert Dialogue(*parts, Settings(8, temperature=0.3))._choice()["temperature"] == 0.3


def test_an_interrupt_keeps_what_was_said(dialogue):
    ask(dialogue, "Hello.", "Hello there.")
    said = []

    def press(delta):
        said.append(delta["content"])
        if len(said) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    answer = ask(dialogue, "Count.", "one two three four five six seven", Paper(press))
    assert answer.ending == "stopped" and answer.kept and len(answer.reply["content"]) < 20
    assert dialogue.messages[-1]["content"] == "".join(said) == answer.reply["content"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    after = check_cache(dialogue, "Go on.", "No.")
    assert after.ending == "whole" and after.known > answer.known


def test_an_interrupt_before_the_first_word_takes_the_message_back(dialogue, picture):
    first = ask(dialogue, "Hello.", "Hello there.")
    dialogue.attach("image", str(picture))
    before = list(dialogue.messages)
    layer = dialogue.model.language_model.model.layers[1]
    hook = layer.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    answer = ask(dialogue, "What is it?")
    hook.remove()
    assert (answer.ending, answer.kept, answer.said) == ("stopped", False, 0)
    assert dialogue.messages == before and len(dialogue.waiting) == 1
    after = check_cache(dialogue, "What is this?", "Grey.")  # the layers' caches were of different lengths
    assert after.known == first.prompt + first.said - 1 and dialogue.waiting == []


def test_cut_off_while_thinking(dialogue):
    dialogue.think = "on"
    answer = ask(dialogue, "Hello.")
    assert (answer.ending, answer.kept, answer.said) == ("length", False, 24) and dialogue.messages == []
    dialogue.think = "off"
    answer = ask(dialogue, "Hello.")
    assert (answer.ending, answer.kept, answer.said) == ("length", True, 24)


def test_the_model_s_context_bounds_dialogue_and_answer(dialogue, monkeypatch):
    length = ask(dialogue, "Hello.", "Hi.").prompt
    dialogue.clear()
    monkeypatch.setattr(dialogue.model.config.text_config, "max_position_embeddings", length + 2)
    assert ask(dialogue, "Hello.").said == 2
    with pytest.raises(ChatError, match=rf"the model reads {length + 2}: /clear"):
        ask(dialogue, "Hello.")


def test_what_goes_wrong_leaves_the_dialogue_as_it_was(dialogue):
    ask(dialogue, "Hello.", "Hello there.")
    before = list(dialogue.messages)
    dialogue.lips.fails = True
    with pytest.raises(RuntimeError, match="weights have gone"):
        ask(dialogue, "And?")
    dialogue.lips.fails = False
    assert dialogue.messages == before
    check_cache(dialogue, "And?", "Nothing.")


def test_bad_pictures_are_named(dialogue, tmp_path, monkeypatch):
    (tmp_path / "words.png").write_text("words")
    (tmp_path / "words.mp4").write_text("words")
    for kind, name, why in [
        ("image", "nope.png", "No such file"),
        ("image", ".", "is not a file"),
        ("image", "words.png", "not a picture"),
        ("video", "words.mp4", "."),
    ]:
        with pytest.raises(ChatError, match=rf"^{re.escape(str(tmp_path / name))}: .*{why}"):
            dialogue.attach(kind, str(tmp_path / name))
    assert dialogue.waiting == []
    monkeypatch.setattr(dialogue.model.config, "vision_config", None)
    with pytest.raises(ChatError, match="no vision part"):
        dialogue.attach("image", str(tmp_path / "words.png"))


def test_files_are_found_as_users_name_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "my cat's.png"
    file.touch()
    for name in (str(file), f'"{file}"', str(file).replace(" ", "\\ ").replace("'", "\\'"), "~/my cat's.png"):
        assert find(name) == file
    assert not find("no 'where").exists()


# -- the screen -------------------------------------------------------------------------------------------------------


@contextmanager
def terminal(columns: int = 40):
    """A text stream that is a terminal, and a function that tells what came out of it."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, columns))
    out, shown = open(slave, "w", encoding="utf-8"), []

    def drain():
        try:
            while data := os.read(master, 65536):
                shown.append(data)
        except OSError:  # its last writer has gone
            pass

    reader = threading.Thread(target=drain)
    reader.start()

    def read() -> str:
        out.close()
        reader.join(10)
        return b"".join(shown).decode().replace("\r\n", "\n")

    try:
        yield out, read
    finally:
        out.close()
        reader.join(10)
        os.close(master)


CALL = {"id": "functions.add:0", "type": "function", "function": {"name": "add", "arguments": ""}}
DELTAS = [
    {"reasoning": "Let me"},
    {"reasoning": " think."},
    {"content": "The answer"},
    {"content": " is 4."},
    {"tool_calls": [{"index": 0, **CALL}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": 1}'}}]},
]


def show(out, folds=False, deltas=DELTAS):
    screen = Screen(out, folds)
    screen.begin(17)
    for delta in deltas:
        screen.show(delta)
    screen.end()
    return screen


def test_thoughts_are_dim_on_a_terminal():
    with terminal() as (out, read):
        show(out)
        shown = read()
    assert shown.endswith(
        "\x1b[2mLet me\x1b[0m\x1b[2m think.\x1b[0m\nThe answer is 4.\n[calls add] " + '{"a": 1}\n'
    )
    assert shown.startswith("\r\x1b[2K\x1b[2mreads 17 tokens …\x1b[0m\r\x1b[2K")


def test_thoughts_fold_into_one_line():
    words = "wide 宽字 words " * 30
    with terminal(columns=30) as (out, read):
        screen = show(out, True, [{"reasoning": "Let\nme"}, {"reasoning": words}, {"content": "Yes."}])
        screen.thoughts("Let me")
        shown = read()
    lines = shown.split("\n")
    assert len(lines) == 4 and lines[1:] == ["Yes.", "\x1b[2mLet me\x1b[0m", ""]
    *passing, folded = lines[0].split("\r\x1b[2K")
    assert folded == f"\x1b[2m▸ {len(words) + 6} characters of thought; /unfold shows them\x1b[0m"
    assert [line for line in passing if line][1] == "\x1b[2m▸ Let me\x1b[0m"
    assert "…" in passing[-1] and passing[-1].startswith("\x1b[2m▸ …")


def test_no_escape_codes_elsewhere(monkeypatch):
    out = io.StringIO()
    show(out).note("not shown")
    assert out.getvalue() == '<think>Let me think.</think>\nThe answer is 4.\n[calls add] {"a": 1}\n'
    out = io.StringIO()
    show(out, folds=True)
    assert out.getvalue() == 'The answer is 4.\n[calls add] {"a": 1}\n'
    monkeypatch.setenv("TERM", "dumb")
    with terminal() as (dumb, read):
        show(dumb)
        assert ESCAPE not in read()


def test_what_a_model_says_cannot_move_the_cursor():
    with terminal() as (out, read):
        show(out, deltas=[{"content": "a\x1b[2Jb\r\x07\x9b\tc\nd"}])
        assert read().endswith("\r\x1b[2Ka␛[2Jb␍␇\ufffd\tc\nd\n")


def test_an_answer_that_does_not_come_leaves_no_line():
    with terminal() as (out, read):
        show(out, deltas=[])
        assert read().endswith("…\x1b[0m\r\x1b[2K")


def test_last_words_fit():
    assert last_of("▸ short", 10) == "▸ short"
    assert last_of("▸ a longer line", 10) == "▸ …er line"
    assert last_of("▸ 一二三四五六", 10) == "▸ …四五六"
    assert last_of("▸ e\u0301e\u0301e\u0301", 5) == "▸ e\u0301e\u0301e\u0301"


# -- lines and commands -----------------------------------------------------------------------------------------------


@pytest.fixture
def converse(dialogue):
    def converse(*lines: str):
        out, errors = io.StringIO(), io.StringIO()
        status = Chat(dialogue, Screen(out), io.StringIO("".join(lines)), errors).run()
        return status, out.getvalue(), errors.getvalue()

    return converse


def users(dialogue):
    return [message["content"] for message in dialogue.messages if message["role"] == "user"]


def test_lines_are_messages(converse, dialogue):
    status, out, errors = converse("Hello.\r\n", "\n", "two \\\n", "lines\n", "//etc is a path\n", "no end")
    assert status == 0 and users(dialogue) == ["Hello.", "two \nlines", "/etc is a path", "no end"]
    assert out == "".join(f"{message['content']}\n" for message in dialogue.messages[1::2])
    assert errors == "[cut off after 24 tokens; what was said is kept]\n" * 4


def test_a_bad_line_ends_nothing(converse, dialogue):
    bad = ("/image nope.png\n", "/video\n", "/think maybe\n", "/fold\n", "/dance\n", "/clear now\n", "/\n")
    status, out, errors = converse(*bad, "Hello.\n", "/quit\n", "no")
    assert status == 1 and users(dialogue) == ["Hello."] and out
    starts = ("nope.png: No such", "/video needs", "/think is one of on, off, keep")
    for line, start in zip(errors.splitlines(), starts):
        assert line.startswith(f"error: {start}")
    assert errors.count("error: ") == 7 and "there is no command /dance; /help" in errors


def test_failures_are_told_and_the_next_line_is_read(converse, dialogue):
    dialogue.lips.fails = True
    status, out, errors = converse("Hello.\n", "/help\n")
    assert (status, out, errors) == (1, HELP + "\n", "error: RuntimeError: the weights have gone\n")


def test_commands(converse, dialogue, picture):
    dialogue.lips.say("Hm.</think>Hello.")
    assert converse("/think keep\n", "Hello.\n", "/unfold\n") == (0, "<think>Hm.</think>\nHello.\nHm.\n", "")
    dialogue.lips.say("Oh.</think>Again.")
    assert converse(f"/image {picture}\n", "/fold on\n", "Again.\n")[1] == "Again.\n"
    assert dialogue.messages[2]["content"][0]["type"] == "image" and dialogue.messages[3]["reasoning"] == "Oh."
    assert converse(f"/image {picture}\n", "/clear\n", "/unfold\n") == (0, "(there were no thoughts)\n", "")
    assert dialogue.messages == [] and dialogue.waiting == []


def test_a_message_without_an_answer_is_a_failure(converse, dialogue, picture):
    status, out, errors = converse("/think on\n", f"/image {picture}\n", "What is it?\n")
    assert status == 1 and out.startswith("<think>") and out.endswith("</think>\n")
    assert "[cut off after 24 tokens before it said anything: the message is not kept, its pictures" in errors


def test_completions(picture):
    assert completions("/th") == ["/think "] and completions("/f") == ["/fold "]
    assert completions(f"/image {picture.parent}/gr") == [f"/image {picture}"]
    assert completions(f"/video {picture.parent}") == [f"/video {picture.parent}/"]
    assert completions("Hello") == completions("") == completions("/think o") == []


def test_typed_lines_are_kept_where_asked(tmp_path):
    readline = pytest.importorskip("readline")
    for line in ("one", "two"):
        with editing(tmp_path / "history"):
            readline.add_history(line)
    readline.clear_history()
    with editing(tmp_path / "history"):
        assert [readline.get_history_item(number) for number in (1, 2)] == ["one", "one"]


@pytest.mark.parametrize("words", ["--max-new-tokens 0", "--temperature nan", "--top-p 1.5", "--think so", "--dtype int8"])
def test_wrong_arguments(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["chat", str(tmp_path), *words.split()])
    assert error.value.code == 2 and words.split()[0] in capsys.readouterr().err


def test_no_checkpoint(tmp_path, capsys):
    assert main(["chat", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err == f"kimi-k26 chat: error: {tmp_path / 'nowhere'} is not a folder\n"


@pytest.mark.parametrize("words", [["--memory", "much"], ["--expert-budget", "some"]])
def test_options_that_a_model_does_not_take(words, endless, capsys):
    verbosity = logging.get_verbosity()
    try:
        assert main(["chat", str(endless), *words]) == 1
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    assert f"error: {words[0]} must be a number of bytes" in capsys.readouterr().err


# -- the command itself -----------------------------------------------------------------------------------------------

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}


def command(folder, *words) -> list[str]:
    return [sys.executable, "-m", "kimi_k26.cli", "chat", str(folder), "--temperature", "0", "--threads", "1", *words]


class Session:
    """The command in a terminal of its own."""

    def __init__(self, words):
        self.seen = ""
        self.pid, self.master = pty.fork()
        if not self.pid:
            os.execve(words[0], words, ENVIRONMENT)
        # Else the terminal, when Ctrl-C is typed, throws away what it holds, and with it what the command says to that.
        modes = termios.tcgetattr(self.master)
        modes[3] |= termios.NOFLSH
        termios.tcsetattr(self.master, termios.TCSANOW, modes)

    def type(self, text: str):
        os.write(self.master, text.encode())

    def expect(self, text: str, seconds: float = 90) -> str:
        """What came up to and including this text."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.seen[-2000:]!r}"
            try:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
            except OSError:
                raise AssertionError(f"the command ended before {text!r}: {self.seen[-2000:]!r}") from None
        before, found, self.seen = self.seen.partition(text)
        return before + found

    def interrupt(self, text: str):
        """Ctrl-C at the prompt until this comes: `input` does not hear one that is struck while it is not waiting."""
        for seconds in (5, 10, 20, 60):
            self.type("\x03")
            with suppress(AssertionError):
                return self.expect(text, seconds)
        raise AssertionError(f"{text!r} did not come: {self.seen[-2000:]!r}")

    def end(self) -> int:
        with pytest.raises(AssertionError, match="ended"):
            self.expect("\0never")
        os.close(self.master)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_in_a_terminal(endless, tmp_path):
    session = Session(command(endless, "--history", str(tmp_path / "history")))
    session.expect("/help lists commands")
    session.expect("> ")
    session.type("Hello.\r")
    session.expect("reads ")
    session.expect("\x1b[2K\x1b[2m")  # the first dim thought
    session.type("\x03")
    session.expect("[stopped before it said anything: the message is not kept]")
    session.type("/think off\r")
    session.expect("thinking: off")
    session.type("Hello.\r")
    session.expect("\x1b[0m\r\x1b[2K")
    session.type("\x03")
    session.expect("[stopped; what was said is kept]")
    session.type("/image nowhere.png\r")
    session.expect("error: nowhere.png: No such file or directory")
    session.expect("> ")
    session.type("half a li")
    session.expect("half a li")
    session.interrupt("Ctrl-C stops an answer")
    session.type("\x1b[A")  # the line before
    session.expect("/image nowhere.png")
    session.type("\x15\x04")  # the line away, then the end of input
    assert session.end() == 0
    typed = (tmp_path / "history").read_text().splitlines()
    assert typed[-4:] == ["Hello.", "/think off", "Hello.", "/image nowhere.png"]


@pytest.mark.once
def test_over_pipes(endless):
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    chat = subprocess.Popen(command(endless), env=ENVIRONMENT, **pipes)
    chat.stdin.write(b"/video nowhere.mp4\n\xff is no text\n")
    chat.stdin.flush()
    out = os.read(chat.stdout.fileno(), 65536)
    chat.send_signal(signal.SIGINT)
    while not out.endswith(b"</think>\n"):
        out += os.read(chat.stdout.fileno(), 65536)
    chat.stdin.write(b"/think off\nGo on.\n")
    chat.stdin.flush()
    out += os.read(chat.stdout.fileno(), 16)
    chat.stdout.close()  # as `| head` does
    assert chat.wait(60) == 1
    errors = chat.stderr.read()
    chat.stdin.close()
    chat.stderr.close()
    assert out.startswith(b"<think>") and ESCAPE.encode() not in out + errors
    assert errors.decode().splitlines() == [
        "error: nowhere.mp4: No such file or directory",
        "[stopped before it said anything: the message is not kept]",
    ]
