"""Text of all kinds for the tokenizer's benchmark, and a vocabulary of the published size for machines without one.

Both are made up from a seed. The words are common ones and ones that are made of syllables, as real text has words that a
vocabulary knows and words that it does not.
"""

import json
import re
from collections import Counter
from itertools import accumulate
from pathlib import Path
from random import Random


PUBLISHED_RANKS = 163_584
LONGEST_TOKEN = 24  # bytes, in a made vocabulary
# What a vocabulary learns from, roughly as it is cut before pairs are joined.
PIECES = re.compile(r"[\u4e00-\u9fff]+| ?[^\W\d]+|\d{1,3}| ?[^\w\s]+|\s+")

COMMON = """the of and to in is that for it as was with be by on not he his but at are this have from or had an they which
one you were all her she there would their we him been has when who will no more if out so up said what its about than into
them can only other time new some could these two may first then do any like my now over such our man me even most made
after also did many before must through years where much your way well down should because each just those people how too
little state good very make world still own see men work long here get both between life being under never day same another
know while last might us great old year off come since against go came right used take three""".split()
CHINESE = """的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多
定行学法所民得经十三之进着等部度家电力里如水化高自二理起小物现实加量都两体制机当使点从业本去把性好应开它合还因由其些然前外天
政四日那社义事平形相全表间样与关各重新线内数正心反你明看原又么利比或但质气第向道命此变条只没结解问意建月公无系军很情者最立代
想已通并提直题党程展五果料象员革位入常文总次品式活设及管特件长求老头基资边流路级少图山统接知较将组见计别她手角期根论运农指几九
区强放决西被干做必战先回则任取据处队南给色光门即保治北造百规热领七海口东导器压志世金增争济阶油思术极交受联什认六共权收证改清""".replace(
    "\n", ""
)
EMOJI = ["😀", "👍", "🎉", "❤️", "👩‍👩‍👧", "🇨🇳", "👋🏽", "🤖", "✨", "½", "→", "🧑‍💻"]
# Special tokens, and what only looks like one.
MARKERS = ["<|im_end|>", "<|im_user|>", "<think>", "</think>", "<|media_pad|>", "[EOS]", "<|tool_call_begin|>"]
ALIKE = ["<|im_end", "|>", "<|im_end |>", "<thinking>", "[BOS", "<|media_pads|>", "< |im_end|>", "<|", "<<|im_end>>"]


class Words:
    """Words of which a few are common and most are rare, as in a language (Zipf)."""

    def __init__(self, rng: Random, count: int = 60_000):
        sounds = ["b", "c", "ch", "d", "f", "g", "h", "l", "m", "n", "p", "qu", "r", "s", "st", "t", "th", "tr", "v", "w"]
        ends = ["", "", "n", "r", "s", "t", "l", "nd", "ng", "ck"]
        syllables = [sound + vowel + end for sound in sounds for vowel in "aeiou" for end in ends]
        self.rng, self.all = rng, COMMON + ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(count)]
        self.weights = list(accumulate(1 / (rank + 10) for rank in range(len(self.all))))
        self.strokes = list(accumulate(1 / (rank + 10) for rank in range(len(CHINESE))))

    def some(self, count: int) -> list[str]:
        return self.rng.choices(self.all, cum_weights=self.weights, k=count)

    def prose(self) -> str:
        words = self.some(self.rng.randint(6, 22))
        words[0] = words[0].capitalize()
        if self.rng.random() < 0.3:
            words[self.rng.randrange(len(words))] += self.rng.choice(["'s", ",", ";", " - and", "n't", ' ("so")'])
        return " ".join(words) + self.rng.choice([". ", ". ", "? ", "! ", ".\n", ".\n\n"])

    def chinese(self) -> str:
        characters = self.rng.choices(CHINESE, cum_weights=self.strokes, k=self.rng.randint(8, 40))
        characters += [chr(self.rng.randint(0x4E00, 0x9FA5)) for _ in range(2)]
        self.rng.shuffle(characters)
        middle = self.rng.randrange(len(characters))
        return "".join(characters[:middle]) + "，" + "".join(characters[middle:]) + self.rng.choice("。。！？") + "\n"

    def code(self) -> str:
        name, argument, other, kind = self.some(4)
        number = self.rng.randint(0, 99_999)
        return self.rng.choice(
            [
                f"def {name}_{argument}({argument}, {other}={number}):\n    if {argument} is None:\n        return "
                f'{other}["{kind}"] + {number}  # {name}\n\n',
                f'{{"{name}": {number}, "{argument}": [{number / 7:.3f}, null], "{other}": {{"{kind}": "{name}"}}}}\n',
                f"for (int i = 0; i < {name}.size(); ++i) {{\n\t{argument}[i] = {other}({kind}Of(i), 0x{number:x});\n}}\n",
                f"SELECT {name}, COUNT(*) FROM {argument} WHERE {other} >= {number} GROUP BY {kind};\r\n",
            ]
        )

    def numbers(self) -> str:
        draw = self.rng.randint
        date = f"{draw(1900, 2030)}-{draw(1, 12):02}-{draw(1, 28):02}"
        return f"{date}\t{draw(0, 10**9):,}\t{draw(0, 10**6) / 1000}\t{draw(0, 100)}%\t{10 ** draw(0, 30)}\n"

    def spaces(self) -> str:
        return self.rng.choice([" ", " ", "\n", "\t", "\u3000", " \n"]) * self.rng.choice([3, 8, 40, 400, 3000])

    def odd(self) -> str:
        return "".join(f"{mark} {word} " for mark, word in zip(self.rng.choices(EMOJI + MARKERS + ALIKE, k=6), self.some(6)))


def mixed_text(size: int, seed: int = 0) -> str:
    """At least `size` bytes of UTF-8: prose, Chinese, code, numbers, emoji, long runs of spaces, special tokens and what
    looks like them."""
    rng = Random(seed)
    words, parts, length = Words(rng), [], 0
    kinds = [words.prose, words.chinese, words.code, words.numbers, words.odd, words.spaces]
    for kind in iter(lambda: rng.choices(kinds, weights=[50, 20, 20, 5, 4, 1])[0], None):
        parts.append(kind())
        length += len(parts[-1].encode())
        if length >= size:
            return "".join(parts)


def made_ranks(count: int = PUBLISHED_RANKS, size: int = 4_000_000) -> dict[bytes, int]:
    """A byte-pair vocabulary of `count` tokens: the bytes, then the beginnings of the most frequent pieces of a mixed text
    of `size` bytes, then those of made-up words."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    frequent = (piece for piece, _ in Counter(PIECES.findall(mixed_text(size, seed=1))).most_common())
    words = Words(Random(2), count)
    for source in (frequent, (" " + word for word in words.all)):
        for piece in source:
            token = piece.encode()[:LONGEST_TOKEN]
            for end in range(2, len(token) + 1):
                if len(ranks) == count:
                    return ranks
                ranks.setdefault(token[:end], len(ranks))
    return ranks


def make_vocabulary(folder: Path, count: int = PUBLISHED_RANKS) -> Path:
    """Write `tiktoken.model` and `tokenizer_config.json` with so many ranks, and what else a processor is loaded from."""
    from kimi_k26.cli.tiny import tiny_config, write_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    ranks = made_ranks(count)
    (folder / "config.json").write_text(json.dumps(tiny_config(len(ranks), quantized=True), indent=2))
    write_tokenizer(folder, ranks)
    return folder
