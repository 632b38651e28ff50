"""response_kimi.py: what the model says → reasoning, content and tool calls, whole and streamed."""

import doctest
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.generation.streamers import BaseStreamer

from kimi_k26 import KimiK26ImageProcessor, KimiK26Processor, ResponseParser, ResponseStreamer, TikTokenTokenizer
from kimi_k26 import parse_response, response_kimi
from kimi_k26.cli.tiny import SAMPLE, learn_ranks, write_tokenizer
from kimi_k26.response_kimi import ODD_ID, PATIENCE, join_deltas

from .replies import CA, CASES, CB, CE, ENGINE_CASES, MARKERS, SB, SB1, SE, SE1, WEATHER, call, random_reply, random_text, reply, written


ROOT = Path(response_kimi.__file__).resolve().parent


def streamed(pieces, thinking=True, tokenizer=None):
    """What the deltas of these pieces join to, checked for their shape on the way."""
    parser = ResponseParser(thinking, tokenizer)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
    seen = set()
    for delta in deltas:
        ((key, value),) = delta.items()
        if key == "tool_calls":
            (part,) = value
            is_first = part["index"] not in seen
            assert is_first == ("id" in part) == ("type" in part) == ("name" in part["function"])
            assert part["index"] == len(seen) - (not is_first) and isinstance(part["function"]["arguments"], str)
            seen.add(part["index"])
        else:
            assert key in ("reasoning", "content") and isinstance(value, str) and value
    joined = join_deltas(deltas)
    return joined | {"stray": parser.stray} if parser.stray else joined


def cut(rng, items, most=8):
    """Text, bytes or ids in random pieces."""
    start = 0
    while start < len(items):
        size = rng.choice((1, 1, 2, 3, rng.randint(1, most)))
        yield items[start : start + size]
        start += size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    write_tokenizer(folder, learn_ranks(SAMPLE, 64))
    (folder / "chat_template.jinja").write_bytes((ROOT / "chat_template.jinja").read_bytes())
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return TikTokenTokenizer.from_pretrained(folder)


def case(name):
    text, expected, *thinking = CASES[name]
    return text, expected, not thinking


@pytest.mark.once
@pytest.mark.parametrize("name", CASES)
def test_cases_whole_and_split_everywhere(name):
    text, expected, thinking = case(name)
    assert parse_response(text, thinking) == expected
    for whole in (text, text.encode()):
        assert streamed([whole], thinking) == expected
        assert streamed([whole[at : at + 1] for at in range(len(whole))], thinking) == expected
        for at in range(1, len(whole)):
            assert streamed([whole[:at], whole[at:]], thinking) == expected, (at, whole[:at])


@pytest.mark.parametrize("name", [name for name in CASES if " in words" not in name and "padding" not in name])
def test_cases_as_ids(name, tokenizer):
    text, expected, thinking = case(name)
    ids = tokenizer.encode(text)
    assert parse_response(ids, thinking, tokenizer=tokenizer) == expected
    for at in range(len(ids) + 1):
        assert streamed([ids[:at], ids[at:]], thinking, tokenizer) == expected, at


# ---- What other engines' parsers for this form are held to ----


@pytest.mark.parametrize("name", ENGINE_CASES)
@pytest.mark.parametrize("opening", ["</think>", "hm</think>", None])
def test_engine_cases(name, opening):
    text, content, calls = ENGINE_CASES[name]
    for pieces in ([text], [*text], [text[at : at + 5] for at in range(0, len(text), 5)]):
        found = streamed([opening or "", *pieces], thinking=opening is not None)
        assert found["content"] == content and found["reasoning"] == (opening or "").replace("</think>", "")
        assert [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in found["tool_calls"]] == calls


def test_engine_case_a_bad_id_does_not_hide_the_good_call():
    text = f"A{SB} {CB}\nfunctions.bad.0 {CA} {WEATHER} {CE} {CB}\nfunctions.good:1 {CA} {WEATHER} {CE} {SE}"
    bad, good = parse_response(text, thinking=False)["tool_calls"]
    assert bad["malformed"] == [ODD_ID] and bad["id"] == "functions.bad.0"
    assert good == call("good", 1, WEATHER)


def test_engine_case_a_section_that_is_none_lets_the_reply_go_on():
    junk = "x" * PATIENCE
    parser = ResponseParser(thinking=False)
    assert parser.feed(f"A{SB}") == [{"content": "A"}]
    assert parser.feed(junk) == []
    assert parser.feed("y") == [{"content": f"{SB}{junk}y"}]
    assert parser.feed("z") == [{"content": "z"}]
    assert join_deltas(parser.feed(written()) + parser.finish()) == reply("", "", call())
    words = f"{CB}{junk} "
    assert parse_response(words + written(), thinking=False) == reply("", words, call())
    assert streamed([*words, written()], thinking=False) == reply("", words, call())


# ---- Random replies ----


def check_random_replies(tokenizer, seeds):
    for seed in seeds:
        rng = random.Random(seed)
        text, thinking, expected = random_reply(rng)
        assert parse_response(text, thinking) == expected, (seed, text)
        whole = (text, text.encode(), tokenizer.encode(text))[seed % 3]
        assert streamed(cut(rng, whole), thinking, tokenizer) == expected, (seed, text)


@pytest.mark.once
def test_random_replies_mean_what_they_were_made_of(tokenizer):
    check_random_replies(tokenizer, range(2000))


@pytest.mark.once
def test_nothing_is_lost_whatever_the_order_of_the_markers(tokenizer):
    rng = random.Random(5)
    for number in range(1000):
        words = [f"w{number}x{at}w" for at in range(rng.randint(1, 12))]
        text = "".join(word + "".join(rng.choices([*MARKERS, " ", ""], k=rng.randrange(4))) for word in words)
        thinking = rng.random() < 0.7
        found = parse_response(text, thinking)
        assert streamed(cut(rng, text), thinking) == streamed(cut(rng, text.encode()), thinking) == found, text
        kept = [found["reasoning"], found["content"], *found.get("stray", ())]
        kept += [c["id"] + " " + c["function"]["arguments"] for c in found["tool_calls"]]
        assert sorted(words) == sorted(w for part in kept for w in words if w in part), text
        assert sum(part.count(w) for part in kept for w in words) == len(words)
        ends = [text.find(end) for end in ("<|im_end|>", "[EOS]", "[PAD]") if end in text]
        ids = tokenizer.encode(text)
        assert streamed(cut(rng, ids), thinking, tokenizer) == parse_response(ids, thinking, tokenizer)
        if not ends:  # after an end, ids are ignored and text is not
            assert parse_response(ids, thinking, tokenizer) == found


def test_bytes_that_are_no_text_are_replaced_as_in_the_whole(tokenizer):
    rng = random.Random(6)
    parts = [b"\xf0\x9f\xa4\x96", b"\xe4\xb8", b"\xff", b"\xf0\x9f", b"a", CE.encode(), b"</think>"]
    for _ in range(300):
        data = b"".join(rng.choices(parts, k=9))
        expected = parse_response(data.decode(errors="replace"))
        assert streamed(cut(rng, data, 4)) == expected
        assert streamed(data[at : at + 1] for at in range(len(data))) == expected


# ---- Ids ----


def test_a_marker_spelled_with_other_tokens_is_text(tokenizer):
    def plain(text):
        return tokenizer.encode(text, split_special_tokens=True)

    words = "".join(marker for marker in MARKERS if marker not in (SB1, SE1))
    ids = [*plain(words), *tokenizer.encode("</think>"), *plain(words), *tokenizer.encode(CB + "functions.f:0" + CA)]
    ids += [*plain(json.dumps({"a": words})), *tokenizer.encode(CE)]
    expected = reply(words, words, call(arguments=json.dumps({"a": words})))
    assert parse_response(ids, tokenizer=tokenizer) == expected
    assert streamed(ids, tokenizer=tokenizer) == expected  # one id at a time


def test_ids_of_every_form(tokenizer):
    ids = tokenizer.encode("r</think>🤖 é")
    for form in (ids, tuple(ids), torch.tensor(ids), np.array(ids)):
        assert parse_response(form, tokenizer=tokenizer) == reply("r", "🤖 é")
    for pieces in (torch.tensor(ids), np.array(ids)):  # numbers without dimensions
        assert streamed(pieces, tokenizer=tokenizer) == reply("r", "🤖 é")


def test_what_follows_the_end_is_ignored_in_ids(tokenizer):
    for end in ("<|im_end|>", "[EOS]", "[PAD]"):
        ids = tokenizer.encode(f"r</think>a{end}<|im_user|>user{written()}")
        assert parse_response(ids, tokenizer=tokenizer) == reply("r", "a")
        assert streamed(ids, tokenizer=tokenizer) == reply("r", "a")


def test_tokens_a_user_added(folder):
    tokenizer = TikTokenTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["é<new>", SB1])
    ids = tokenizer.encode(f"</think>é<new>{SB1}{written()}{SE1}")
    assert ids[1:3] == tokenizer.convert_tokens_to_ids(["é<new>", SB1])
    assert parse_response(ids, tokenizer=tokenizer) == reply("", "é<new>", call())


def test_text_comes_as_soon_as_it_is_certain(tokenizer):
    parser = ResponseParser()
    assert parser.feed("a <") == [{"reasoning": "a "}]
    assert parser.feed("b") == [{"reasoning": "<b"}] and parser.in_reasoning
    assert parser.feed("c</think") == [{"reasoning": "c"}] and parser.in_reasoning
    assert parser.feed(">") == [] and not parser.in_reasoning
    assert parser.feed(f"d{SB}{CB}functions.f:0") == [{"content": "d"}]
    (begun,) = parser.feed(CA)
    assert begun == {"tool_calls": [{"index": 0, **call(arguments="")}]}
    assert parser.feed(' {"a": ') == [{"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]}]
    assert parser.feed("1} ") == [{"tool_calls": [{"index": 0, "function": {"arguments": " 1}"}}]}]
    assert parser.feed(CE + SE) == [] and parser.feed("") == []
    assert parser.feed("<|im") == [] and parser.finish() == [{"content": "<|im"}] and parser.finish() == []
    robot = tokenizer.encode("🤖")
    assert len(robot) > 1
    parser = ResponseParser(False, tokenizer)
    assert [parser.feed(index) for index in robot] == [[]] * (len(robot) - 1) + [[{"content": "🤖"}]]


def test_arguments_of_a_megabyte_take_linear_work(tokenizer):
    scanned = 0

    class Counting:
        def __init__(self, pattern):
            self.pattern = pattern

        def finditer(self, text):
            nonlocal scanned
            scanned += len(text)
            return self.pattern.finditer(text)

    size, step = 1 << 20, 200
    for filling in ("x", " ", "<", "<|tool_call_", "é🤖"):
        arguments = json.dumps({"text": (filling * size)[:size]}, ensure_ascii=False)
        parser, scanned, largest = ResponseParser(False), 0, 0
        parser._lexer._pattern = Counting(parser._lexer._pattern)
        deltas = parser.feed(f"{SB}{CB}functions.f:0{CA}")
        for at in range(0, len(arguments), step):
            new = parser.feed(arguments[at : at + step])
            largest = max([largest, *(len(delta["tool_calls"][0]["function"]["arguments"]) for delta in new)])
            deltas += new
        deltas += parser.feed(CE) + parser.finish()
        assert join_deltas(deltas) == reply("", "", call(arguments=arguments))
        # Every piece is looked at once, with the little before it that may begin a marker, and handed out at once. Only
        # white space waits, as it may be layout, and is not looked at again.
        assert scanned < 1.2 * len(arguments)
        assert filling == " " or largest < step + 40
    ids = tokenizer.encode(written(arguments='{"text": "' + "word " * (size // 20) + '"}'))
    (found,) = parse_response(ids, False, tokenizer)["tool_calls"]
    assert len(found["function"]["arguments"]) > size // 4 and "malformed" not in found


def test_arguments_nested_too_deeply_are_kept():
    arguments = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (found,) = parse_response(written(arguments=arguments))["tool_calls"]
    assert found["function"]["arguments"] == arguments
    number = '{"a": ' + "7" * 10_000 + "}"
    assert parse_response(written(arguments=number))["tool_calls"] == [call(arguments=number)]


@pytest.mark.parametrize(
    ("piece", "error", "says"),
    [
        ([1, 2], TypeError, "tokenizer"),
        (None, TypeError, "None"),
        (1.5, TypeError, "1.5 of type float"),
        ([[1]], TypeError, "row of ids"),
        (["a"], TypeError, "row of ids"),
    ],
)
def test_what_is_no_reply(piece, error, says):
    with pytest.raises(error, match=says):
        parse_response(piece)


def test_wrong_use(tokenizer):
    with pytest.raises(ValueError, match="999999"):
        parse_response([999999], tokenizer=tokenizer)
    with pytest.raises(TypeError, match="thinking must be True or False, not 'no'"):
        parse_response("a", thinking="no")
    parser = ResponseParser()
    parser.feed("a")
    with pytest.raises(TypeError, match="text came before, now bytes"):
        parser.feed(b"b")
    parser.finish()
    with pytest.raises(RuntimeError, match="finished"):
        parser.feed("b")


# ---- Round trip ----

USER = {"role": "user", "content": "x"}


def random_message(rng, marker):
    """A message with, if given, a marker in all that it says."""

    def words():
        return random_text(rng, 10) and random_text(rng) + marker + random_text(rng)

    calls = [
        call(rng.choice(["f", "a.b-c"]), index, json.dumps({words(): words()}, indent=rng.choice([None, 2])))
        for index in range(rng.randrange(4))
    ]
    return {"role": "assistant", **reply(words(), words(), *calls)}


def check_round_trip(tokenizer, seeds):
    """Half of the messages talk about a marker, which only ids can tell from one that is meant."""
    for seed in seeds:
        rng = random.Random(seed)
        marker = rng.choice(MARKERS) if seed % 2 else ""
        message = random_message(rng, "" if marker in (SB1, SE1) else marker)
        thinking = bool(message["reasoning"]) or rng.random() < 0.5
        kwargs = {"thinking": thinking, "preserve_thinking": thinking}

        def render(messages, **more):
            return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **kwargs, **more)

        prompt = render([USER])
        whole = render([USER, message], add_generation_prompt=False)
        assert whole[: len(prompt)] == prompt
        ids = whole[len(prompt) :]
        parsed = parse_response(ids, thinking, tokenizer)
        assert parsed == {key: message[key] for key in ("reasoning", "content", "tool_calls")}
        assert marker or parsed == parse_response(tokenizer.decode(ids), thinking)
        again = render([USER, {"role": "assistant", **parsed}], add_generation_prompt=False)
        assert again == whole, seed


def test_a_parsed_reply_renders_to_the_tokens_it_came_from(tokenizer):
    check_round_trip(tokenizer, range(300))


def test_round_trip_with_the_published_vocabulary(golden, tmp_path):
    for name in ("tiktoken.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((golden / "vocab" / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes((ROOT / "chat_template.jinja").read_bytes())
    tokenizer = TikTokenTokenizer.from_pretrained(tmp_path)
    check_round_trip(tokenizer, range(100))
    check_random_replies(tokenizer, range(100))


def test_golden_chats_are_read(golden):
    read = 0
    for chat in json.loads((golden / "chat.json").read_text(encoding="utf-8")):
        replies = [message for message in chat["messages"] if message["role"] == "assistant"]
        texts = re.split(r"<\|im_assistant\|>\w+<\|im_middle\|><think>", chat["text"])[1:]
        for message, text in zip(replies, texts):
            found = parse_response(text.split("<|im_end|>")[0])
            assert found["content"] == (message.get("content") or "")
            assert found["reasoning"] in ("", message.get("reasoning") or message.get("reasoning_content"))
            assert len(found["tool_calls"]) == len(message.get("tool_calls") or ())
            for made, given in zip(found["tool_calls"], message.get("tool_calls") or ()):
                arguments = given["function"]["arguments"]
                arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
                assert json.loads(made["function"].pop("arguments")) == arguments
                assert made == {**given, "function": {"name": given["function"]["name"]}}
            read += 1
    assert read


# ---- Where it is used ----


def test_streamer(tokenizer):
    ids = tokenizer.encode(f"r</think>🤖{SB}{written()}{SE}<|im_end|>")
    streamer = ResponseStreamer(tokenizer, timeout=60)
    assert {name for name in vars(BaseStreamer) if name[0] != "_"} == {"put", "end"}
    streamer.put(torch.tensor([tokenizer.encode("a prompt</think>")]))
    for index in ids[:5]:
        streamer.put(torch.tensor([index]))
    streamer.put(torch.tensor(ids[5:9]))
    streamer.put(torch.tensor([ids[9:]]))  # assisted generation has rows
    streamer.end()
    assert join_deltas(streamer) == reply("r", "🤖", call())
    with pytest.raises(ValueError, match="2 rows"):
        ResponseStreamer(tokenizer).put(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(TimeoutError, match="0.01 s"):
        next(iter(ResponseStreamer(tokenizer, timeout=0.01)))


def test_processor_and_streamer_with_generate(tiny_checkpoint):
    processor = AutoProcessor.from_pretrained(tiny_checkpoint, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, trust_remote_code=True)
    inputs = processor.apply_chat_template([USER], tokenize=True, return_dict=True, return_tensors="pt", thinking=False)
    streamer = ResponseStreamer(processor.tokenizer, thinking=False, timeout=300)
    out = []
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "streamer": streamer}
    thread = Thread(target=lambda: out.append(model.generate(**inputs, **options)))
    thread.start()
    deltas = list(streamer)
    thread.join()
    said = out[0][0, inputs["input_ids"].shape[1] :]
    assert join_deltas(deltas) == processor.parse_response(said, thinking=False)
    assert deltas and processor.parse_response("r</think>a") == reply("r", "a")


def test_processor_of_the_package(tokenizer):
    processor = KimiK26Processor(KimiK26ImageProcessor(), tokenizer)
    text = f"r</think>a{written()}"
    assert processor.parse_response(text) == processor.parse_response(tokenizer.encode(text)) == reply("r", "a", call())
    assert processor.parse_response(text, thinking=False)["content"] == "r</think>a"


def test_replies_as_the_library_hands_them_over(tokenizer):
    """All that `decode` takes, several at once, the prompt as `prefix`."""
    processor, text = KimiK26Processor(KimiK26ImageProcessor(), tokenizer), "r</think>a"
    ids, wanted = tokenizer.encode(text), reply("r", "a")
    for parse in (processor.parse_response, tokenizer.parse_response):
        for one in (np.array(ids), torch.tensor(ids), list(torch.tensor(ids)), list(np.array(ids)), tuple(ids), text.encode()):
            assert parse(one) == parse(response=one, prefix="", tools=[]) == wanted
        for several in ([text, text], [ids, ids], torch.tensor([ids, ids]), [torch.tensor(ids)] * 2, (text, ids)):
            assert parse(several) == [wanted, wanted]
        assert parse(text, False) == parse(text, thinking=False) == parse(text, prefix="<|im_middle|><think></think>") == reply("", text)
        prompts = ["<|im_middle|><think>well", "a <think> typed <|im_middle|><think></think>"]
        assert parse([text, text], prefix=prompts) == [wanted, reply("", text)]
        assert parse([text, text], prefix=[tokenizer.encode(prompt) for prompt in prompts]) == [wanted, reply("", text)]
        with pytest.raises(ValueError, match="2 replies and 3 prefixes"):
            parse([text, text], prefix=["", "", ""])


def test_imports_nothing_heavy():
    code = "import sys; from kimi_k26 import parse_response, ResponseParser, ResponseStreamer; parse_response('a')\n"
    code += "print(sorted({'torch', 'transformers', 'numpy', 'tiktoken'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_examples_in_the_docstrings():
    assert doctest.testmod(response_kimi).attempted == 2 and doctest.testmod(response_kimi).failed == 0
