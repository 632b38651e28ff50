"""Talks about tools that nobody has seen before: a declaration, a question, the call, its result, an answer."""

import json
from dataclasses import dataclass
from random import Random

VERBS = ("get", "find", "fetch", "read", "check", "search", "list", "look_up", "load", "query", "show", "lookup", "compute")
NOUNS = (
    "weather", "price", "time", "distance", "score", "temperature", "status", "balance", "address", "route", "recipe",
    "news", "stock", "traffic", "schedule", "population", "height", "age", "speed", "rate", "order", "ticket", "room",
    "song", "book", "flight", "train", "light", "door", "battery", "level", "color", "size", "weight", "date", "winner",
)  # fmt: skip
PARAMETERS = (
    "city", "location", "date", "name", "id", "count", "days", "unit", "color", "symbol", "query", "path", "user",
    "country", "place", "item", "product", "limit", "year", "month", "hour", "amount", "number", "from", "to", "size",
    "room", "title", "code", "language", "team", "key", "street", "station", "level", "start", "end", "currency",
)  # fmt: skip
WORDS = (
    "Paris", "London", "Tokyo", "Berlin", "Rome", "Madrid", "Beijing", "Shanghai", "Oslo", "Cairo", "Lima", "Delhi",
    "Anna", "Tom", "Maria", "John", "apple", "banana", "table", "chair", "monday", "friday", "sunny", "rainy", "cloudy",
    "open", "closed", "ready", "empty", "full", "warm", "cold", "windy", "gold", "silver", "north", "south",
)  # fmt: skip
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"


def made_up_word(rng: Random) -> str:
    word = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.choice((1, 2, 2, 2, 3))))
    return word + (rng.choice("lmnrst") if rng.random() < 0.3 else "")


def _word(rng: Random, known: tuple[str, ...]) -> str:
    return rng.choice(known) if rng.random() < 0.5 else made_up_word(rng)


@dataclass
class Talk:
    tools: list[dict]
    question: str
    asked: str  # the word of the question that says which tool is meant: its noun, or its name
    name: str
    arguments: dict
    result: str
    reply: str
    values: list[str]  # what the answer must say


def _tool(rng: Random) -> tuple[dict, str, list[tuple[str, dict]]]:
    """A tool's declaration, the noun it is about, and its parameters in the order in which they are declared."""
    noun = _word(rng, NOUNS)
    style = rng.random()
    if style < 0.65:
        name = f"{_word(rng, VERBS)}_{noun}"
    elif style < 0.75:
        name = noun
    elif style < 0.85:
        name = f"{noun}_{_word(rng, VERBS)}"
    else:
        name = f"{rng.choice(VERBS[:6])}{noun.capitalize()}"
    properties: dict[str, dict] = {}
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        parameter = _word(rng, PARAMETERS)
        if rng.random() < 0.1:
            parameter += "_" + _word(rng, PARAMETERS)
        roll = rng.random()
        if roll < 0.5:
            schema: dict = {"type": "string"}
        elif roll < 0.8:
            schema = {"type": rng.choice(("integer", "number"))}
        elif roll < 0.95:
            choices = {_word(rng, WORDS) for _ in range(rng.randint(2, 3))}
            schema = {"type": "string", "enum": sorted(choices)}
        else:
            schema = {"type": "boolean"}
        if rng.random() < 0.2:
            schema["description"] = rng.choice(("The {}", "the {} to use", "{} of the {noun}")).format(
                parameter.replace("_", " "), noun=noun
            )
        properties[parameter] = schema
    required = [key for key in properties if rng.random() < 0.8] or [next(iter(properties))]
    function: dict = {"name": name, "parameters": {"type": "object", "properties": properties, "required": required}}
    if rng.random() < 0.6:
        function["description"] = rng.choice(
            ("Get the {}", "Get the {} for a {p}", "Returns the {}", "Find the {} of a {p}", "Look up the {}", "{} by {p}")
        ).format(noun, p=next(iter(properties)))
    declared = sorted(properties, key=lambda key: (key not in required, key))
    return {"type": "function", "function": function}, noun, [(key, properties[key]) for key in declared]


def _value(rng: Random, schema: dict):
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if schema["type"] == "boolean":
        return rng.random() < 0.5
    if schema["type"] == "integer":
        return rng.choice((rng.randint(0, 9), rng.randint(10, 99), rng.randint(100, 9999)))
    if schema["type"] == "number":
        return rng.choice((rng.randint(0, 99), round(rng.uniform(0, 99), 1)))
    word = _word(rng, WORDS)
    if rng.random() < 0.4:
        word = word.capitalize()
    return word if rng.random() < 0.85 else f"{word} {_word(rng, WORDS)}"


def _written(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _question(
    rng: Random, name: str, noun: str, parameters: list[tuple[str, dict]], arguments: dict
) -> tuple[str, str]:
    """The question, and which word of it says what tool is meant."""
    given = [key for key, _ in parameters if key in arguments]
    rng.shuffle(given)
    if len(given) == 1 and not isinstance(arguments[given[0]], bool) and rng.random() < 0.5:
        form = rng.choice((
            "What is the {n} in {v}?", "What is the {n} for {v}?", "What is the {n} of {v}?", "How is the {n} in {v}?",
            "Find the {n} for {v}.", "Tell me the {n} of {v}.", "What's the {n} in {v}?", "{n} in {v}?",
            "Please check the {n} for {v}.", "I need the {n} of {v}.", "What is the {n} in {v} today?",
        ))  # fmt: skip
        return form.format(n=noun, v=_written(arguments[given[0]])), noun
    join = rng.choice(("{} {}", "{} {}", "{} = {}", "{}: {}", "{} is {}", "{}={}"))
    spoken = rng.random() < 0.5
    pairs = [join.format(key.replace("_", " ") if spoken else key, _written(arguments[key])) for key in given]
    listed = pairs[0] if len(pairs) == 1 else ", ".join(pairs[:-1]) + rng.choice((" and ", ", ")) + pairs[-1]
    form = rng.choice((
        "What is the {n} for {l}?", "Find the {n} with {l}.", "I need the {n}: {l}.", "Please get the {n}, {l}.",
        "Tell me the {n} for {l}.", "Call {t} with {l}.", "Use {t} with {l}.", "Please call {t}: {l}.",
        "Look up the {n} ({l}).", "Check the {n} with {l}, please.", "What is the {n}? {l}.",
    ))  # fmt: skip
    return form.format(n=noun, l=listed, t=name), name if "{t}" in form else noun


def _result(rng: Random, noun: str) -> tuple[str, str, list[str]]:
    """What the tool gives back, the answer told from it, and the values the answer must hold."""

    def value():
        roll = rng.random()
        if roll < 0.45:
            return _word(rng, WORDS)
        return rng.choice((rng.randint(0, 99), rng.randint(100, 9999), round(rng.uniform(0, 99), 1)))

    if rng.random() < 0.4:
        result = _written(value())
        if rng.random() < 0.3:
            result += f" {_word(rng, WORDS)}"
        return result, f"The {noun} is {result}.", [result]
    keys = [noun if rng.random() < 0.5 else _word(rng, NOUNS)]
    if rng.random() < 0.5:
        keys.append(_word(rng, NOUNS))
    found = {key: value() for key in keys}
    told = [f"the {key} is {_written(one)}" for key, one in found.items()]
    text = " and ".join(told)
    return json.dumps(found), text[0].upper() + text[1:] + ".", [_written(one) for one in found.values()]


def random_talk(rng: Random, counts: tuple[int, ...] = (1, 1, 1, 2, 2, 3)) -> Talk:
    """A talk with as many tools as one of `counts`."""
    made = [_tool(rng) for _ in range(rng.choice(counts))]
    names, nouns = [t[0]["function"]["name"] for t in made], [t[1] for t in made]
    if len(set(names)) < len(made) or len(set(nouns)) < len(made):
        return random_talk(rng, counts)
    tool, noun, parameters = rng.choice(made)
    function = tool["function"]
    required = function["parameters"]["required"]
    arguments = {key: _value(rng, schema) for key, schema in parameters if key in required or rng.random() < 0.4}
    question, asked = _question(rng, function["name"], noun, parameters, arguments)
    result, reply, values = _result(rng, noun)
    return Talk([t[0] for t in made], question, asked, function["name"], arguments, result, reply, values)
