"""Replies as the model writes them, or may, and what they mean."""

import json

from kimi_k26.response_kimi import NO_ARGUMENTS, NOT_CLOSED, ODD_ARGUMENTS, ODD_ID


SB, SE = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
SB1, SE1 = "<|tool_call_section_begin|>", "<|tool_call_section_end|>"
CB, CA, CE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
MARKERS = (SB, SE, SB1, SE1, CB, CA, CE, "<think>", "</think>", "<|im_end|>", "[EOS]", "[PAD]")


def written(name="f", index=0, arguments='{"a": 1}'):
    return f"{CB}functions.{name}:{index}{CA}{arguments}{CE}"


def call(name="f", index=0, arguments='{"a": 1}', call_id=None, malformed=None):
    made = {
        "id": f"functions.{name}:{index}" if call_id is None else call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
    return made if malformed is None else made | {"malformed": malformed}


def reply(reasoning="", content="", *calls, stray=None):
    made = {"reasoning": reasoning, "content": content, "tool_calls": list(calls)}
    return made if stray is None else made | {"stray": stray}


# ---- Cases: with thinking unless the last item is False ----

NAN = '{"a": NaN}'
CUT_IN_ID = [ODD_ID, NO_ARGUMENTS, NOT_CLOSED, ODD_ARGUMENTS]
CASES = {
    "the whole form": (
        f"Need it.</think>Wait.{SB}{written()}{SE}<|im_end|>",
        reply("Need it.", "Wait.", call()),
    ),
    "content alone": ("Why?</think>\n\nBecause. <b> [x] {}", reply("Why?", "\n\nBecause. <b> [x] {}")),
    "no thinking in it": ("</think>Yes", reply("", "Yes")),
    "nothing": ("", reply()),
    "instant": (f"Yes </think> and <think>{SB}{written()}{SE}", reply("", "Yes </think> and <think>", call()), False),
    "thinking that never closes": ("I think <|tool", reply("I think <|tool")),
    "the prompt's <think> once more": ("<think>a<think></think>b</think>", reply("a<think>", "b</think>")),
    "a section in unclosed thinking": (f"so {SB}{written()}{SE}Done", reply("so ", "Done", call())),
    "a call in unclosed thinking": (f"so {written()}", reply("so ", "", call())),
    "an empty section in unclosed thinking": (f"so {SB} {SE}Done", reply("so ", "Done")),
    "a call without a section": (f"</think>A {written()} B", reply("", "A  B", call())),
    "calls without a section": (
        f"</think>{written()}\n{written('g', 1)} ",
        reply("", "\n ", call(), call("g", 1)),
    ),
    "calls with only the section's end": (f"</think>A{written()}\n{SE}\nB", reply("", "A\nB", call())),
    "a section that never closes": (f"</think>A{SB}{written()}{written('g', 1)}", reply("", "A", call(), call("g", 1))),
    "words after a section that never closes": (f"</think>{SB}{written()}\nDone", reply("", "\nDone", call())),
    "a second section where the first never closed": (
        f"</think>{SB}{written()} and {SB}{written('g', 1)}{SE}.",
        reply("", " and .", call(), call("g", 1)),
    ),
    "words between and after sections": (
        f"</think>A {SB}{written()}{SE} B\n{SB}{written('g', 1)}{SE}\nC",
        reply("", "A  B\n\nC", call(), call("g", 1)),
    ),
    "words after a call in a section": (
        f"</think>{SB}{written()} hm {written('g', 1)}\n{SE}",
        reply("", " hm ", call(), call("g", 1)),
    ),
    "words before the first call in a section": (
        f"</think>A{SB} oh {written()}{SE}B",
        reply("", "AB", call(), stray=[" oh "]),
    ),
    "layout": (
        f"</think>A{SB}\n  {CB} functions.f:0\n{CA}\n{{ }}\n {CE}\n\n{CB}functions.g:1{CA} {{}}{CE}\n{SE}\nB",
        reply("", "A\nB", call(arguments="{ }"), call("g", 1, "{}")),
    ),
    "singular section markers": (f"r{SB1}{written()}{SE1}.", reply("r", ".", call())),
    "mixed section markers": (
        f"</think>{SB1}{written()}{SE}.{SB}{written('g', 1)}{SE1}",
        reply("", ".", call(), call("g", 1)),
    ),
    "nested arguments": (
        f"</think>{SB}{written(arguments=json.dumps({'a': [{'b': 'x{}<|' + chr(10)}], 'é': None}, indent=2))}{SE}",
        reply("", "", call(arguments=json.dumps({"a": [{"b": "x{}<|\n"}], "é": None}, indent=2))),
    ),
    "names": (
        f"</think>{written('a.b-c__d')}{CB}search:3{CA}{{}}{CE}{CB}functions.名:12{CA}{{}}{CE}",
        reply("", "", call("a.b-c__d"), call("search", 0, "{}", "search:3"), call("名", 12, "{}")),
    ),
    # cut off
    "cut off in the arguments": (
        f'</think>{SB}{written()}{CB}functions.g:1{CA}{{"a": "b ',
        reply("", "", call(), call("g", 1, '{"a": "b ', malformed=[NOT_CLOSED, ODD_ARGUMENTS])),
    ),
    "cut off where the arguments are whole": (
        f"</think>{SB}{CB}functions.f:0{CA}{{}}<|im_end|>",
        reply("", "", call(arguments="{}", malformed=[NOT_CLOSED])),
    ),
    "cut off in the marker of the arguments": (
        f"</think>{SB}{CB}functions.f:0<|tool_call_arg",
        reply("", "", call("f:0<|tool_call_arg", 0, "", "functions.f:0<|tool_call_arg", CUT_IN_ID)),
    ),
    "cut off in the id": (
        f"hm{CB}functions.get_w",
        reply("hm", "", call("get_w", 0, "", "functions.get_w", CUT_IN_ID)),
    ),
    "cut off before the id": (f"</think>A{SB}{CB}", reply("", "A")),
    "cut off before the call": (f"</think>A{SB}\n", reply("", "A")),
    # malformed
    "an id that is none": (
        f"</think>{SB}{CB}functions.get.0{CA}{{}}{CE}{written('g', 1)}{SE}",
        reply("", "", call("get.0", 0, "{}", "functions.get.0", [ODD_ID]), call("g", 1)),
    ),
    "no id": (f"</think>{SB}{CB}{CA}{{}}{CE}{SE}", reply("", "", call("", 0, "{}", "", [ODD_ID]))),
    "no id and no arguments": (f"</think>{SB}{CB}{CE}{written()}{SE}", reply("", "", call())),
    "no marker of the arguments": (
        f"</think>{SB}{CB}functions.f:0 {{}}{CE}{written('g', 1)}{SE}",
        reply("", "", call("f:0 {}", 0, "", "functions.f:0 {}", [ODD_ID, NO_ARGUMENTS, ODD_ARGUMENTS]), call("g", 1)),
    ),
    "arguments that are not JSON": (
        f"</think>{SB}{written(arguments=' {a: 1')}{written('g', 1, ' [1] ')}{written('h', 2, '{} NaN ')}{SE}",
        reply(
            "",
            "",
            call(arguments="{a: 1", malformed=[ODD_ARGUMENTS]),
            call("g", 1, " [1] ", malformed=[ODD_ARGUMENTS]),
            call("h", 2, "{} NaN ", malformed=[ODD_ARGUMENTS]),
        ),
    ),
    "arguments that are JSON for Python alone": (
        f"</think>{written(arguments=NAN)}{written('g', 1, '')}",
        reply("", "", call(arguments=NAN, malformed=[ODD_ARGUMENTS]), call("g", 1, "", malformed=[ODD_ARGUMENTS])),
    ),
    "calls that do not close": (
        f"</think>{SB}{CB}functions.f:0{CA}{{}}\n{written('g', 1)}{CB}functions.h:2{CA}{{}}{SE}A",
        reply(
            "",
            "A",
            call(arguments="{}", malformed=[NOT_CLOSED]),
            call("g", 1),
            call("h", 2, "{}", malformed=[NOT_CLOSED]),
        ),
    ),
    "a call in an id": (
        f"</think>{SB}{CB}functions.f:0{written('g', 1)}{SE}",
        reply("", "", call(arguments="", malformed=[NO_ARGUMENTS, NOT_CLOSED, ODD_ARGUMENTS]), call("g", 1)),
    ),
    "doubled markers": (
        f"</think>A{SB}{SB}{written()}{CE}{CA} {written('g', 1)}{SE}",
        reply("", "A", call(), call("g", 1), stray=[CE, CA]),
    ),
    "markers of other parts in arguments": (
        f"r{CB}functions.f:0{CA}<think>{SB}{CA}</think>{CE}",
        reply("r", "", call(arguments=f"<think>{SB}{CA}</think>", malformed=[ODD_ARGUMENTS])),
    ),
    # markers that are talked about
    "a marker of a section in words": (
        f"the {SB} one</think>{SB} begins, {SE} ends",
        reply(f"the {SB} one", f"{SB} begins, {SE} ends"),
    ),
    "and then a section": (f"</think>{SB} it is: {SB}{written()}{SE}", reply("", f"{SB} it is: ", call())),
    "a marker of a call in words": (
        f"{CB} then</think>{CB}, {CA} and {CE} it is",
        reply(f"{CB} then", f"{CB}, {CA} and {CE} it is"),
    ),
    "an end of a reply in words": (
        "a <|im_end|> b</think>[EOS] or [PAD] <|im_end|> ?",
        reply("a <|im_end|> b", "[EOS] or [PAD] <|im_end|> ?"),
    ),
    "the end of the reply": ("a</think>b <|im_end|>[EOS] \n[PAD][PAD]", reply("a", "b ")),
    "the end of the other kind": (f"a</think>{written(arguments='{} ')}[EOS]", reply("a", "", call(arguments="{}"))),
    "padding alone is none": ("</think>the token [PAD]", reply("", "the token [PAD]")),
}


# ---- What other engines' parsers for this form are held to ----

WEATHER = '{"city": "Beijing"}'
F, F0 = written(arguments="{}"), ("functions.f:0", "f", "{}")
ENGINE_CASES = {
    "no tools": ("This is a test", "This is a test", []),
    "one call, spaced": (
        f"I'll check. {SB} {CB}\nfunctions.get_weather:0 {CA} {WEATHER} {CE} {SE}",
        "I'll check. ",
        [("functions.get_weather:0", "get_weather", WEATHER)],
    ),
    "calls without space between": (
        f"{SB}{CB}functions.a:0{CA}{{}}{CE}{CB}functions.b:1{CA}{WEATHER}{CE}{CB}functions.c:2{CA}{{}}{CE}{SE}",
        "",
        [("functions.a:0", "a", "{}"), ("functions.b:1", "b", WEATHER), ("functions.c:2", "c", "{}")],
    ),
    "angle brackets and line ends in arguments": (
        f'{SB}{CB}functions.w:0{CA}{{"html": "<div>a</div>\\n<|x|>",\n "n": {{"m": []}}}}{CE}{SE}',
        "",
        [("functions.w:0", "w", '{"html": "<div>a</div>\\n<|x|>",\n "n": {"m": []}}')],
    ),
    "an id without the prefix": (f"{SB}{CB}search:0{CA}{{}}{CE}{SE}", "", [("search:0", "search", "{}")]),
    "a name with dashes": (
        f"{SB}{CB}functions.mcp__a-b__c:7{CA}{{}}{CE}{SE}",
        "",
        [("functions.mcp__a-b__c:7", "mcp__a-b__c", "{}")],
    ),
    "broken JSON stays a call": (
        f'{SB}{CB}functions.bad:0{CA}{{"city": "Beijing" {CE}{CB}functions.good:1{CA}{WEATHER}{CE}{SE}',
        "",
        [("functions.bad:0", "bad", '{"city": "Beijing" '), ("functions.good:1", "good", WEATHER)],
    ),
    "an empty section": (f"Before {SB}{SE} after", "Before  after", []),
    "words in a section do not leak": (f"A {SB} spurious text {F}{SE}", "A ", [F0]),
    "singular markers": (f"A {SB1}{F}{SE1} B", "A  B", [F0]),
    "words after a section": (f"A{SB}{F}{SE} Done. More", "A Done. More", [F0]),
    "a section without end": (f"A{SB}{F}", "A", [F0]),
}


# ---- Random replies ----

PARTS = ["a", "Wörter ", " ", "\n", "中文", "🤖", "e\u0301", "<", "<|", "<|tool_call", "</thin", "[", "[EOS"]
PARTS += ["|>", "{", "}", '"', "\\", ":0", "\ufeff", "\u3000"]


def random_text(rng, most=6):
    return "".join(rng.choice(PARTS) for _ in range(rng.randrange(most)))


def random_call(rng, index):
    """A call without its end, as the model may write it, and what it means."""
    name = rng.choice(["f", "get_weather", "a.b-c", "名"])
    space = [rng.choice(["", "", "", " ", "\n "]) for _ in range(4)]
    call_id, problems = f"functions.{name}:{index}", []
    arguments = {random_text(rng): [random_text(rng), index, {"a": None}]}
    arguments = json.dumps(arguments, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
    if rng.random() < 0.1:
        call_id, name = rng.choice([(f"functions.{name}", name), ("call_9", "call_9"), (f"{name}:x", f"{name}:x")])
        problems.append(ODD_ID)
    if rng.random() < 0.1:
        arguments = space[2] + "[" + random_text(rng) + space[3]
        space[2:] = ["", ""]
        problems.append(ODD_ARGUMENTS)
    text = f"{CB}{space[0]}{call_id}{space[1]}{CA}{space[2]}{arguments}{space[3]}"
    return text, call(name, index, arguments, call_id, problems)


def random_reply(rng):
    """A reply as the model may write it, whether the prompt asked for thinking, and what it means."""
    thinking = rng.random() < 0.8
    thinks = thinking and rng.random() < 0.3  # and does not close it
    said = {"reasoning": "", "content": ""}
    calls, text = [], ""
    if thinking:
        said["reasoning"] = random_text(rng, 10)
        text = rng.choice(["", "", "<think>"]) + said["reasoning"] + ("" if thinks else "</think>")

    def speak(words):
        said["reasoning" if thinks and not calls else "content"] += words
        return words

    text += speak(random_text(rng))
    for _ in range(rng.randrange(4)):
        in_section, ends = rng.random() < 0.7, True
        text += rng.choice([SB, SB, SB1]) + rng.choice(["", "", "\n"]) if in_section else ""
        for _ in range(rng.randint(1, 3)):
            text += rng.choice(["", "", " \n"]) if in_section else ""
            written_call, meaning = random_call(rng, len(calls))
            calls.append(meaning)
            ends = rng.random() < 0.95
            text += written_call + (CE if ends else "")
            if not ends:
                meaning["malformed"].insert(meaning["malformed"][:1] == [ODD_ID], NOT_CLOSED)
                break
        if not ends or rng.random() < 0.7:
            text += rng.choice([SE, "\n" + SE, SE1]) if ends else SE
        else:
            text += speak(".")  # so that white space that follows is no layout
        text += speak(random_text(rng))
    if calls and rng.random() < 0.1:
        written_call, meaning = random_call(rng, len(calls))
        first = written_call.index(CA) + len(CA)
        got = written_call[first : rng.randint(first, len(written_call))]
        text += SB + written_call[:first] + got
        trimmed = got.lstrip() if got.lstrip().startswith("{") else got
        trimmed = trimmed.rstrip() if trimmed.startswith("{") and trimmed.rstrip().endswith("}") else trimmed
        meaning["function"]["arguments"] = trimmed
        whole = ODD_ARGUMENTS not in meaning["malformed"] and trimmed.endswith("}") and is_json(trimmed)
        meaning["malformed"] = meaning["malformed"][: meaning["malformed"][:1] == [ODD_ID]] + [NOT_CLOSED]
        meaning["malformed"] += [] if whole else [ODD_ARGUMENTS]
        calls.append(meaning)
    text += rng.choice(["", "", "<|im_end|>", "<|im_end|>[PAD]\n[PAD]"])
    for meaning in calls:
        if not meaning["malformed"]:
            del meaning["malformed"]
    return text, thinking, reply(said["reasoning"], said["content"], *calls)


def is_json(text):
    try:
        return bool(json.loads(text))
    except ValueError:
        return False
