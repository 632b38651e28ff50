"""tokenization_kimi.py, text_ids_kimi.py and token_bytes_kimi.py: text ⇄ ids through the library's interface."""

import base64
import copy
import json
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AddedToken, AutoTokenizer, TextStreamer

from kimi_k26.token_bytes_kimi import TokenBytes
from kimi_k26.tokenization_kimi import TikTokenTokenizer
from kimi_k26.vocabulary_kimi import spelled, split_long_text, write_ranks


ROOT = Path(__file__).resolve().parents[1]
CODE = "tokenization_kimi.py", "chat_kimi.py", "response_kimi.py", "text_ids_kimi.py", "token_bytes_kimi.py", "tool_declaration_kimi.py", "vocabulary_kimi.py"
MERGES = ["he", "ll", "hell", "hello", " w", "or", " wor", "ld", " world", "  ", "    ", "aa", "aaaa", "中", "中文"]
NAMED = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 10: "<|im_system|>"}
NAMED |= {17: "<|im_middle|>", 22: "<think>", 23: "</think>", 254: "[UNK]", 255: "[PAD]"}
USER = {"role": "user", "content": "hello"}


def make_folder(folder):
    """A vocabulary of 256 bytes and a few merges, in the published layout."""
    parts = [bytes([value]) for value in range(256)]
    for merge in MERGES:
        for end in range(2, len(merge.encode()) + 1):
            if merge.encode()[:end] not in parts and (merge in ("中", "中文") or end == len(merge.encode())):
                parts.append(merge.encode()[:end])
    folder.mkdir(parents=True, exist_ok=True)
    write_ranks({part: rank for rank, part in enumerate(parts)}, folder / "tiktoken.model")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "added_tokens_decoder": {
            str(len(parts) + i): {"content": name, "special": "think" not in name, **flags} for i, name in NAMED.items()
        },
        "additional_special_tokens": [n for n in NAMED.values() if n[0] == "<" and "think" not in n],
        **{"bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]", "pad_token": "[PAD]"},
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {},
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(ROOT / "chat_template.jinja", folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("small") / "vocabulary")


@pytest.fixture
def tok(folder):
    return TikTokenTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def published(golden, tmp_path_factory):
    """The published vocabulary as users have it: a folder with code, loaded by AutoTokenizer."""
    target = tmp_path_factory.mktemp("published") / "model"
    target.mkdir()
    for name in ("tiktoken.model", "tokenizer_config.json"):
        shutil.copyfile(golden / "vocab" / name, target / name)
    for name in (*CODE, "chat_template.jinja"):
        shutil.copyfile(ROOT / name, target / name)
    return AutoTokenizer.from_pretrained(target, trust_remote_code=True)


# ---- The published vocabulary ----


def test_golden_ids(published, golden):
    rows = json.loads((golden / "tokenizer.json").read_text(encoding="utf-8"))
    for row in rows:
        text, ids, plain = row["text"], row["ids"], row["ids_as_plain_text"]
        assert published(text)["input_ids"] == published.encode(text) == ids, text
        assert published.encode(text, allow_special_tokens=False) == plain, text
        assert published(text, split_special_tokens=True)["input_ids"] == plain, text
        assert published.decode(ids) == published.decode(plain) == text
        assert published.convert_tokens_to_ids(published.tokenize(text)) == ids
        assert published.convert_tokens_to_string(published.tokenize(text)) == text
    assert published([row["text"] for row in rows])["input_ids"] == [row["ids"] for row in rows]


def test_golden_chats(published, golden):
    for case in json.loads((golden / "chat.json").read_text(encoding="utf-8")):
        text = published.apply_chat_template(case["messages"], tools=case["tools"], tokenize=False, **case["kwargs"])
        assert text == case["text"], (case["name"], case["kwargs"])
        # One of these chats has special tokens typed in a message; see test_control_tokens.py.
        flags = {**case["kwargs"], "sanitize_control_tokens": case["name"] != "special_text_in_user"}
        ids = published.apply_chat_template(case["messages"], case["tools"], return_dict=False, **flags)
        assert ids == published.encode(text)


def test_published_special_tokens(published):
    assert (published.vocab_size, len(published)) == (163840, 163840)
    ids = [published.bos_token_id, published.eos_token_id, published.unk_token_id, published.pad_token_id]
    assert ids == [163584, 163585, 163838, 163839]
    assert published.convert_tokens_to_ids(["<|media_pad|>", "<think>", "</think>"]) == [163605, 163606, 163607]
    assert published.convert_ids_to_tokens([163586, 163589, 163600]) == [
        "<|im_end|>",
        "<|reserved_token_163589|>",
        "<|reserved_token_163600|>",
    ]
    text = "<|im_user|>a<think>b</think><|tool_call_begin|>c<|tool_call_end|><|media_pad|><|reserved_token_163600|>[EOS]"
    shown = "a<think>b</think><|tool_call_begin|>c<|tool_call_end|><|reserved_token_163600|>"
    assert published.decode(published.encode(text), skip_special_tokens=True) == shown


def test_tiny_vocabularies_have_the_same_layout(golden):
    for name in ("tiny-fp32", "tiny-int4"):
        tiny = TikTokenTokenizer.from_pretrained(golden / name)
        assert (len(tiny), tiny.pad_token_id, tiny.convert_tokens_to_ids("<think>")) == (1024, 1023, 790)
        assert tiny.encode("<|reserved_token_773|>") == [773]
        vocabulary = tiny.get_vocab()
        assert sorted(vocabulary.values()) == list(range(1024)) and len(vocabulary) == 1024


# ---- Calls ----


@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 500_000, "中" * 500_000, "\n" * 300_000, "ab, " * 300_000])
def test_megabytes_neither_panic_nor_change(tok, text):
    ids = tok(text)["input_ids"]
    assert tok.decode(ids) == text
    assert ids == [index for piece in split_long_text(text) for index in tok.encode(piece)]


def test_vocabulary_is_a_bijection(tok):
    vocabulary = tok.get_vocab()
    assert sorted(vocabulary.values()) == list(range(tok.vocab_size)) and len(vocabulary) == tok.vocab_size == len(tok)
    tokens = tok.convert_ids_to_tokens(range(len(tok)))
    assert tok.convert_tokens_to_ids(tokens) == list(range(len(tok)))
    assert tok.convert_tokens_to_ids("no such token") == tok.unk_token_id
    assert tok.convert_tokens_to_ids([b"a", 3]) == [tok.unk_token_id] * 2  # no strings, and no tokens
    assert tok.convert_tokens_to_ids("hello") == tok.encode("hello")[0]


def test_forms_of_input(tok):
    one, other = tok.encode("hello world"), tok.encode("中文")
    assert one + other == tok.encode("hello world", "中文") == tok("hello world", "中文")["input_ids"]
    assert tok(["hello world", "中文"])["input_ids"] == tok(("hello world", "中文"))["input_ids"] == [one, other]
    assert tok([("hello world", "中文")])["input_ids"] == tok(["hello world"], ["中文"])["input_ids"] == [one + other]
    assert tok(["hello", " world"], is_split_into_words=True)["input_ids"] == one
    assert tok([["hello", " world"], ["中文"]], is_split_into_words=True)["input_ids"] == [one, other]
    assert tok(one)["input_ids"] == tok.encode(tok.tokenize("hello world")) == one
    assert tok([one, other])["input_ids"] == [one, other]
    assert tok(text_target="中文")["input_ids"] == tok("hello", text_target="中文")["labels"] == other
    assert tok("")["input_ids"] == tok("")["attention_mask"] == tok([])["input_ids"] == tok.encode("") == []
    assert tok(["", "hello"])["attention_mask"] == [[], [1]]
    assert list(tok("hello")) == ["input_ids", "attention_mask"]
    assert tok.num_special_tokens_to_add() == tok.num_special_tokens_to_add(pair=True) == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, ["text must be", "None"]),
        (5, ["text must be", "int"]),
        (["a", None], ["text[1]", "None"]),
        (["a", "b", 2.5], ["text[2]", "2.5"]),
        ([["a", "b", "c"]], ["text[0]"]),
        ([("a", None)], ["text[0]"]),
        (b"bytes", ["bytes"]),
    ],
)
def test_wrong_input_is_a_type_error_with_its_index(tok, given, words):
    with pytest.raises(TypeError) as error:
        tok(given)
    assert all(word in str(error.value) for word in words), error.value


def test_wrong_pairs(tok):
    with pytest.raises(TypeError, match=r"text_pair\[1\]"):
        tok(["a", "b"], ["c", 4])
    with pytest.raises(TypeError, match="text_pair must be a list"):
        tok(["a"], "b")
    with pytest.raises(ValueError, match="1 items.*2"):
        tok(["a"], ["b", "c"])


def test_padding_and_truncation(tok):
    texts, pad = ["hello", "hello world中文"], tok.pad_token_id
    long = tok.encode(texts[1])
    right = tok(texts, padding=True, return_tensors="pt")
    assert right["input_ids"].tolist() == [[long[0], pad, pad], long] and right["input_ids"].dtype == torch.long
    assert right["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    left = tok(texts, padding=True, padding_side="left")
    assert left["input_ids"] == [[pad, pad, long[0]], long] and left["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    assert tok(texts, padding=True, pad_to_multiple_of=8, return_tensors="np")["input_ids"].shape == (2, 8)
    assert tok("hello", padding="max_length", max_length=4)["attention_mask"] == [1, 0, 0, 0]
    assert tok(texts, truncation=True, max_length=2)["input_ids"] == [[long[0]], long[:2]]
    tok.truncation_side = tok.padding_side = "left"
    both = tok(texts, truncation=True, max_length=2, padding=True)
    assert both["input_ids"] == [[pad, long[0]], long[1:]]
    assert tok.encode(texts[1], truncation=True, max_length=1) == long[-1:]
    assert tok.encode("hello", " world中文", truncation="only_second", max_length=2) == [long[0], long[2]]
    with pytest.raises(ValueError, match="padding"):
        tok(texts, return_tensors="pt")


def test_tensors_of_empty_and_single_texts(tok):
    assert tok("hello", return_tensors="pt")["input_ids"].tolist() == [tok.encode("hello")]
    for given, shape in (("", (1, 0)), ([""], (1, 0)), (["", ""], (2, 0))):
        for kind, dtype in (("pt", torch.int64), ("np", np.int64)):
            ids = tok(given, return_tensors=kind)["input_ids"]
            assert ids.shape == shape and ids.dtype == dtype


def test_length_overflow_and_masks(tok):
    long = tok.encode("hello world中文")
    out = tok("hello world中文", truncation=True, max_length=1, return_overflowing_tokens=True, return_length=True, stride=1)
    assert (out["input_ids"], out["overflowing_tokens"], out["num_truncated_tokens"]) == (long[:1], long, 2)
    batch = tok(["hello", "hello world中文"], truncation=True, max_length=2, return_overflowing_tokens=True)
    assert batch["overflowing_tokens"] == [[], long[2:]]
    assert tok(["hello", "hello world"], return_length=True)["length"] == [1, 2]
    assert tok("hello", return_attention_mask=False).keys() == {"input_ids"}
    assert tok("hello", "a", return_token_type_ids=True)["token_type_ids"] == [0, 1]
    assert tok("hello", return_special_tokens_mask=True)["special_tokens_mask"] == [0]


def test_offsets(tok):
    text = "hello world<think>中é👩 "
    out = tok(text, return_offsets_mapping=True)
    for index, (start, end) in zip(out["input_ids"], out["offset_mapping"]):
        data = spelled(tok.convert_ids_to_tokens(index))
        assert data in text[start:end].encode() and (end - start == 1 or data == text[start:end].encode())
    assert out["offset_mapping"][:3] == [(0, 5), (5, 11), (11, 18)]
    cut = tok([text, "hello"], return_offsets_mapping=True, truncation=True, max_length=2, padding=True, padding_side="left")
    assert cut["offset_mapping"] == [[(0, 5), (5, 11)], [(0, 0), (0, 5)]]
    lone = tok("\ud800hello", return_offsets_mapping=True)
    assert lone["offset_mapping"][-1] == (1, 6) and tok.decode(lone["input_ids"]) == "\ufffdhello"
    with pytest.raises(NotImplementedError):
        tok("a", "b", return_offsets_mapping=True)


# ---- Special and added tokens ----


def test_special_tokens_in_text(tok):
    end = tok.convert_tokens_to_ids("<|im_end|>")
    assert tok.encode("hello<|im_end|>") == [*tok.encode("hello"), end]
    for plain in (
        tok.encode("<|im_end|>", allow_special_tokens=False),
        tok("<|im_end|>", split_special_tokens=True)["input_ids"],
        tok(["<|im_end|>"], allow_special_tokens=False)["input_ids"][0],
    ):
        assert end not in plain and tok.decode(plain) == "<|im_end|>"
    tok.split_special_tokens = True
    assert end not in tok.encode("<|im_end|>") and end in tok("<|im_end|>", split_special_tokens=False)["input_ids"]


def test_added_tokens(tok, tmp_path):
    before = len(tok)
    assert tok.add_tokens(["<new>", "think", AddedToken("<strip>", lstrip=True, rstrip=True), "hello"]) == 3
    assert tok.add_special_tokens({"additional_special_tokens": ["<|extra|>", "汉"]}) == 2
    assert (len(tok), tok.vocab_size) == (before + 5, before)
    new, think, strip, extra, han = range(before, before + 5)

    def check(tok):
        hello = tok.convert_tokens_to_ids("hello")
        assert tok.encode("hello<new>hello") == [hello, new, hello]
        # The longest name wins, wherever it comes from: this is the marker, not the added word in it.
        assert tok.encode("<think>think") == [tok.convert_tokens_to_ids("<think>"), think]
        assert tok.encode("hello  <strip>\n hello") == [hello, strip, hello]
        assert tok.encode("<strip> <strip> <new>") == [strip, strip, new]
        assert tok.encode("<|extra|>汉", split_special_tokens=True) == [
            *tok.encode("<|"), *tok.encode("extra"), *tok.encode("|>"), *"汉".encode()
        ]  # fmt: skip
        ids = tok.encode("hello<new> world<|extra|>汉")
        assert tok.decode(ids) == "hello<new> world<|extra|>汉"
        assert tok.decode(ids, skip_special_tokens=True) == "hello<new> world"
        assert tok.convert_tokens_to_string(tok.convert_ids_to_tokens(ids)) == "hello<new> world<|extra|>汉"
        assert tok.convert_ids_to_tokens(ids, skip_special_tokens=True)[1] == "<new>"
        offsets = tok("hello <strip> hello", return_offsets_mapping=True)["offset_mapping"]
        assert offsets == [(0, 5), (6, 13), (14, 19)]
        assert "<|im_end|>" not in tok.decode(tok.encode("<|im_end|>"), skip_special_tokens=True)

    check(tok)
    tok.save_pretrained(tmp_path)
    again = TikTokenTokenizer.from_pretrained(tmp_path)
    check(again)
    check(pickle.loads(pickle.dumps(tok)))
    check(copy.deepcopy(tok))
    assert again.get_vocab() == tok.get_vocab() and len(again) == len(tok)


def test_names_that_would_be_bytes_cannot_be_added(tok):
    """The library looks added names up among byte pairs in their printable form, where é is a byte that is no text."""
    before = tok.encode("aéb")
    for name in ("é", AddedToken("Ġ")):
        with pytest.raises(ValueError, match=f"'{name}' cannot be added: .* bytes"):
            tok.add_tokens([name])
    assert tok.encode("aéb") == before and tok.decode(before) == "aéb"


def test_single_word_tokens(tok):
    tok.add_tokens([AddedToken("cat", single_word=True)])
    cat = len(tok) - 1
    assert cat in tok.encode("a cat b") and cat in tok.encode("cat")
    assert cat not in tok.encode("concat") and tok.decode(tok.encode("concat cats")) == "concat cats"


# ---- Decode ----


def test_decode_accepts_arrays_and_batches(tok):
    ids = tok.encode("hello world")
    for form in (ids, tuple(ids), np.array(ids), torch.tensor(ids), [np.int64(i) for i in ids]):
        assert tok.decode(form) == "hello world"
    assert tok.decode(ids[0]) == tok.decode(np.int32(ids[0])) == tok.decode(torch.tensor(ids[0])) == "hello"
    for batch in ([ids, ids[:1]], [np.array(ids), np.array(ids[:1])], [torch.tensor(ids), torch.tensor(ids[:1])]):
        assert tok.batch_decode(batch) == tok.decode(batch) == ["hello world", "hello"]
    assert tok.batch_decode(np.array([ids])) == tok.batch_decode(torch.tensor([ids])) == ["hello world"]
    assert tok.decode([]) == "" and tok.batch_decode([]) == [] and tok.batch_decode([[]]) == [""]
    assert tok.convert_ids_to_tokens(torch.tensor(ids)) == ["hello", "Ġworld"]
    assert tok.decode(tok.encode("a , b"), clean_up_tokenization_spaces=True) == "a, b"


@pytest.mark.parametrize("bad", [-1, 10**6, 10**12])
def test_ids_outside_the_vocabulary(tok, bad):
    for call in (tok.decode, tok.batch_decode, lambda ids: tok.decode(ids, skip_special_tokens=True)):
        with pytest.raises(ValueError, match=rf"\[1\] is {bad}.*{len(tok) - 1}"):
            call([65, bad])
    with pytest.raises(ValueError, match=str(bad)):
        tok.convert_ids_to_tokens([bad])
    with pytest.raises(TypeError, match=r"\[0\]"):
        tok.decode([1.5])


def test_ids_between_added_tokens_have_none(tmp_path):
    folder = make_folder(tmp_path / "vocabulary")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = config["added_tokens_decoder"]
    last = max(map(int, named))
    named[str(last + 3)] = named[str(last)] | {"content": "<far>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tok = TikTokenTokenizer.from_pretrained(folder)
    assert tok.decode([65, last + 3, 65]) == "A<far>A"
    assert tok.decode([65, last, last + 3], skip_special_tokens=True) == "A"
    tok.unk_token, tok.sep_token = None, "<nowhere>"  # a special token without id is skipped nowhere
    assert tok.decode([65, last + 3], skip_special_tokens=True) == "A"
    for index in (last + 1, last + 2, last + 4):
        for skip in (False, True):
            with pytest.raises(ValueError, match=rf"\[1\] is {index}"):
                tok.decode([65, index], skip_special_tokens=skip)


@pytest.mark.parametrize("late", [(), ("<new>", "汉")])
def test_decode_is_the_bytes_of_each_token_one_after_the_other(tok, late, monkeypatch):
    """Ids at random, with and without special tokens and tokens a user added; more than are taken at once, too."""
    monkeypatch.setattr(TokenBytes, "STRIDE", 64)
    tok.add_tokens(list(late))
    if late:
        tok.add_special_tokens({"additional_special_tokens": ["<|late|>"]})
    special = {index for index, token in tok.added_tokens_decoder.items() if token.special}
    assert tok.convert_tokens_to_ids("<|late|>") in (special if late else [tok.unk_token_id])
    rng = random.Random(4)
    ordinary = [index for index in range(len(tok)) if index not in special]
    for choice in (range(len(tok)), ordinary, sorted(special), range(len(MERGES) + 256)):
        for length in (1, 7, 300):
            ids = rng.choices(choice, k=length)
            kept = [index for index in ids if index not in special]
            for given, skip in ((ids, False), (kept, True)):
                parts = [tok.convert_ids_to_tokens(index) for index in given]
                data = [p.encode() if p in tok.get_added_vocab() else spelled(p) for p in parts]
                assert tok.decode(ids, skip_special_tokens=skip) == b"".join(data).decode("utf-8", "replace")
            assert tok.decode(np.array(ids), skip_special_tokens=True) == tok.decode(kept)


class Pieces(TextStreamer):
    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.pieces = []

    def on_finalized_text(self, text, stream_end=False):
        self.pieces.append(text)


def test_streaming_shows_whole_characters(tok):
    text = "hello é👩‍👩‍👧 中文汉 字\nend 👩"
    ids = tok.encode(text)
    assert any("\ufffd" in tok.decode([index]) for index in ids)  # characters do fall apart here
    streamer = Pieces(tok)
    for index in ids:
        streamer.put(torch.tensor([index]))
    streamer.end()
    assert "".join(streamer.pieces) == text and not any("\ufffd" in piece for piece in streamer.pieces)


# ---- Files ----


def test_save_and_load(tok, folder, tmp_path):
    tok.padding_side = "left"
    saved = tok.save_pretrained(tmp_path)
    assert {"tokenizer_config.json", "tiktoken.model", "chat_template.jinja"} <= {Path(name).name for name in saved}
    for name in ("tiktoken.model", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    before, after = (json.loads((f / "tokenizer_config.json").read_text()) for f in (folder, tmp_path))
    # The published form on every version of the library: nothing of it is lost, nothing is renamed.
    assert {key: after.get(key) for key in before} == before
    assert set(after) - set(before) <= {"model_max_length", "padding_side"}
    again = TikTokenTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tok.get_vocab() and again.added_tokens_decoder == tok.added_tokens_decoder
    assert again.all_special_tokens == tok.all_special_tokens and again.chat_template == tok.chat_template


def test_list_of_extra_special_tokens_as_version_5_writes_it(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["extra_special_tokens"] = config.pop("additional_special_tokens")
    path.write_text(json.dumps(config))
    again = TikTokenTokenizer.from_pretrained(tmp_path / "copy")
    assert again.all_special_tokens == TikTokenTokenizer.from_pretrained(folder).all_special_tokens


def test_remote_code_folder_saves_a_remote_code_folder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    for name in CODE:
        shutil.copy(ROOT / name, tmp_path / "model")
    tok = AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=True)
    tok.save_pretrained(tmp_path / "saved")
    assert all((tmp_path / "saved" / name).is_file() for name in CODE)
    again = AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(again).__name__ == "TikTokenTokenizer" and again.encode("hello<think>") == tok.encode("hello<think>")
    copied = pickle.loads(pickle.dumps(tok))
    assert copied.encode("hello") == tok.encode("hello") and copied.chat_template == tok.chat_template


def test_folder_without_named_special_tokens_is_refused(folder, tmp_path):
    shutil.copy(folder / "tiktoken.model", tmp_path)
    with pytest.raises(ValueError, match="added_tokens_decoder.*tokenizer_config.json"):
        TikTokenTokenizer.from_pretrained(tmp_path)


def test_folder_without_vocabulary_is_refused(folder, tmp_path):
    shutil.copy(folder / "tokenizer_config.json", tmp_path)
    with pytest.raises(ValueError, match="no tiktoken.model"):
        TikTokenTokenizer.from_pretrained(tmp_path)


def test_vocabulary_that_holds_a_special_token_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    line = base64.b64encode(b"<think>") + b" 0\n"
    content = (folder / "tiktoken.model").read_bytes()
    (tmp_path / "copy" / "tiktoken.model").write_bytes(line + content[content.index(b"\n") + 1 :])
    with pytest.raises(ValueError, match="<think>"):
        TikTokenTokenizer.from_pretrained(tmp_path / "copy")


# ---- Chats ----


def chat_text(tok, *args, **kwargs):
    return tok.apply_chat_template(*args, tokenize=False, **kwargs)


def test_generation_prompt_by_default(tok):
    opened = "<|im_assistant|>assistant<|im_middle|><think>"
    assert chat_text(tok, [USER]).endswith(opened)
    assert chat_text(tok, [USER], thinking=None) == chat_text(tok, [USER])
    assert chat_text(tok, [USER], thinking=False).endswith(opened + "</think>")
    assert not chat_text(tok, [USER], add_generation_prompt=False).endswith(opened)
    answer = {"role": "assistant", "content": "I am"}
    assert chat_text(tok, [USER, answer], continue_final_message=True).endswith("<think></think>I am")


def test_results_of_a_chat_are_those_of_the_library(tok):
    text = chat_text(tok, [USER])
    default = tok.apply_chat_template([USER])
    expected = dict(tok(text)) if transformers.__version__ >= "5" else tok.encode(text)
    assert (dict(default) if transformers.__version__ >= "5" else default) == expected
    out = tok.apply_chat_template([[USER], [USER, USER]], return_dict=True, padding=True, return_tensors="pt")
    assert out["input_ids"].shape == out["attention_mask"].shape and out["attention_mask"][0, -1] == 0
    assert chat_text(tok, [[USER], [USER]]) == [text, text]


def test_tools_as_functions_and_dicts(tok):
    def ping(host: str):
        """
        Pings.

        Args:
            host: whom
        """

    declared = "// Pings.\ntype ping = (_: {\n  // whom\n  host: string\n}) => any;"
    assert declared in chat_text(tok, [USER], tools=[ping])
    bad = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"oneOf": []}}}}}
    text = '[{"function":{"name":"f","parameters":{"properties":{"x":{"oneOf":[]}}}},"type":"function"}]'
    assert text in chat_text(tok, [USER], tools=[bad])
    assert "tool_declare" not in chat_text(tok, [USER], tools=[])
    with pytest.raises(TypeError, match=r"tools\[0\]"):
        tok.apply_chat_template([USER], tools=["f"])


def test_wrong_flags_and_conversations(tok):
    for name in ("thinking", "preserve_thinking"):
        with pytest.raises(TypeError, match=name):
            tok.apply_chat_template([USER], **{name: "yes"})
    with pytest.raises(ValueError, match="empty"):
        tok.apply_chat_template([])
    with pytest.raises(ValueError, match=r"conversations\[1\] is empty"):
        tok.apply_chat_template([[USER], []])
    tok.chat_template = None
    with pytest.raises(ValueError, match="chat_template"):
        tok.apply_chat_template([USER])


def test_assistant_mask(tok):
    chat = [USER, {"role": "assistant", "reasoning": "wh中y", "content": "hello"}, USER, {"role": "assistant", "content": "é"}]

    def masked(out, row=None):
        ids, mask = (out[key] if row is None else out[key][row] for key in ("input_ids", "assistant_masks"))
        assert len(ids) == len(mask)
        return tok.decode([index for index, inside in zip(ids, mask) if inside])

    out = tok.apply_chat_template(chat, return_assistant_tokens_mask=True)
    assert out["input_ids"] == tok.encode(chat_text(tok, chat, add_generation_prompt=False))
    assert masked(out) == "hello<|im_end|>é<|im_end|>"
    kept = tok.apply_chat_template(chat, return_assistant_tokens_mask=True, preserve_thinking=True, return_tensors="pt")
    assert kept["assistant_masks"].shape == kept["input_ids"].shape
    assert masked(kept, 0) == "wh中y</think>hello<|im_end|>é<|im_end|>"
    for side in ("left", "right"):
        kwargs = {"return_assistant_tokens_mask": True, "padding": True, "tokenizer_kwargs": {"padding_side": side}}
        batch = tok.apply_chat_template([chat, chat[:2]], return_dict=True, **kwargs)
        assert masked(batch, 0) == masked(out) and masked(batch, 1) == "hello<|im_end|>"
    cut = tok.apply_chat_template(chat, return_assistant_tokens_mask=True, truncation=True, max_length=len(out["input_ids"]) - 1)
    assert masked(cut) == "hello<|im_end|>é"
    with pytest.raises(ValueError, match="return_assistant_tokens_mask"):
        tok.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=False)
    for masks in ({}, {"return_assistant_tokens_mask": True}):
        plain = tok.apply_chat_template(chat, add_generation_prompt=False, return_dict=True, **masks)
        with_offsets = tok.apply_chat_template(chat, add_generation_prompt=False, return_dict=True, tokenizer_kwargs={"return_offsets_mapping": True}, **masks)
        offsets = with_offsets.pop("offset_mapping")
        assert dict(with_offsets) == dict(plain) and len(offsets) == len(plain["input_ids"])
        tensors = tok.apply_chat_template(chat, add_generation_prompt=False, return_dict=True, tokenizer_kwargs={"return_tensors": "np"}, **masks)
        assert tensors["input_ids"].tolist() == [plain["input_ids"]]


def test_text_generation_pipeline(tok):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tok), **sizes))
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tok, device="cpu")
    out = pipe([USER], max_new_tokens=3, do_sample=False)
    assert out[0]["generated_text"][-1]["role"] == "assistant"
    batch = pipe(["hello", "hello world"], max_new_tokens=2, do_sample=False, return_full_text=True, batch_size=2)
    assert [row[0]["generated_text"][:5] for row in batch] == ["hello", "hello"]
