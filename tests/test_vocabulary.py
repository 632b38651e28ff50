"""The byte-pair file, how tokens are written as strings, and where long text is cut."""

import base64
import random

import pytest

from kimi_k26.vocabulary_kimi import printable, read_ranks, spelled, split_long_text, write_ranks

from .test_tokenization import make_folder


def test_vocabulary_file_comes_back_byte_for_byte(tmp_path):
    folder = make_folder(tmp_path / "vocabulary")
    ranks = read_ranks(folder / "tiktoken.model")
    write_ranks(ranks, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (folder / "tiktoken.model").read_bytes()
    assert all(spelled(printable(token)) == token for token in ranks)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"YQ== 0\nYg== x\n", ["line 2", "Yg== x"]), (b"YQ== 0\n\nY 1\n", ["line 3"]), (b"YQ== 0\nYg== 2\n", ["0 to 1"])],
)
def test_malformed_vocabulary_file_is_named(tmp_path, content, words):
    path = tmp_path / "tiktoken.model"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_ranks(path)
    assert all(word in str(error.value) for word in [str(path), *words])


MALFORMED = [b"YQ==", b"YQ== 0 0", b"Y*== 0", b"YQ==YQ== 0", b"YQ 0", b"Y=== 0", b"==== 0", b"YQ== 0.0", b"\xff 0", b" 0", b"YQ==\n0"]


@pytest.mark.parametrize("blank", [b"", b"\n"])
@pytest.mark.parametrize("line", MALFORMED)
def test_every_kind_of_malformed_line_is_named(tmp_path, line, blank):
    path = tmp_path / "tiktoken.model"
    path.write_bytes(b"Yg== 0\n" + blank + line + b"\nYw== 1\n")
    with pytest.raises(ValueError, match=f"line {2 + len(blank)}: expected 'BASE64 RANK'"):
        read_ranks(path)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b" \n", b"\n\n \n"])
def test_ranks_come_in_their_order_whatever_that_of_the_lines(tmp_path, end):
    rng = random.Random(2)
    tokens = list(dict.fromkeys(rng.randbytes(rng.randint(1, 12)) for _ in range(500)))
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "in order").write_bytes(end.join(lines))
    rng.shuffle(lines)
    (tmp_path / "shuffled").write_bytes(end.join([*lines, b""]))
    for name in ("in order", "shuffled"):
        ranks = read_ranks(tmp_path / name)
        assert list(ranks) == tokens and list(ranks.values()) == list(range(len(tokens)))


def test_printable_characters_are_those_of_the_table():
    characters = [printable(bytes([byte])) for byte in range(256)]
    assert len(set(characters)) == 256 and all(len(char) == 1 and char.isprintable() for char in characters)
    assert (printable(b"a !"), printable(b"\x00 \x7f\xad"), printable("é".encode())) == ("aĠ!", "ĀĠġŃ", "Ã©")
    data = random.Random(3).randbytes(1000)
    assert printable(data) == "".join(characters[byte] for byte in data) and spelled(printable(data)) == data


def cut_step_by_step(text, most=400_000, longest_run=25_000):
    """`split_long_text`, one character at a time."""
    pieces = []
    for begin in range(0, len(text), most):
        part, start, run = text[begin : begin + most], 0, 0
        for i, char in enumerate(part):
            run = run + 1 if i and char.isspace() == part[i - 1].isspace() else 1
            if run > longest_run:
                pieces.append(part[start:i])
                start, run = i, 1
        pieces.append(part[start:])
    return pieces


def test_long_text_is_cut_where_the_published_tokenizer_cuts():
    rng = random.Random(1)
    texts = ["", "a" * 25_000, "a" * 25_001, " " * 25_000 + "b" * 25_001, "ab " * 140_000, "\x1c\u2003" * 30_000]
    for _ in range(8):
        runs = [rng.choice("a中 \n\u3000") * rng.choice([1, 7, 12_499, 24_999, 25_000, 25_001, 60_001]) for _ in range(14)]
        texts.append("".join(runs))
    for text in texts:
        assert list(split_long_text(text)) == (cut_step_by_step(text) if text else [])
