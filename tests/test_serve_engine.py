"""The server's engine: many requests in one batch, each as if it were alone."""

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="the server takes the extra `serve`")

from kimi_k26 import KimiK26ForConditionalGeneration
from kimi_k26.cli.serve.engine import Clip, Engine, Prompt, QueueFull, Sequence, Stopped, padded, prompt_keys
from kimi_k26.cli.serve.latents import RowCache
from kimi_k26.cli.serve.prefixes import Prefixes
from kimi_k26.cli.serve.sampling import Sampler, Settings, sample
from kimi_k26.native_kimi_k26 import library
from kimi_k26.tests.tiny_models import EOS, MEDIA, make_model, media_prompt, words

GREEDY = Settings(temperature=0.0)


@pytest.fixture(scope="module")
def model():
    return make_model("sdpa")


@pytest.fixture
def engine(request, model):
    """An engine that is stopped in the end; `indirect` parameters are its arguments."""
    made = Engine(model, **{"end_ids": [EOS], "rows": 4, "chunk": 7, **getattr(request, "param", {})})
    made.start()
    yield made
    made.close(halt=True)
    assert made.join(10)


class Listener:
    """Takes what the engine says."""

    def __init__(self, at_token=None):
        self.tokens, self.sampled, self.ending, self.over = [], [], None, threading.Event()
        self.times, self.at_token = [], at_token

    def take(self, sampled):
        self.tokens.append(sampled.token)
        self.sampled.append(sampled)
        self.times.append(time.monotonic())
        return self.at_token(self) if self.at_token else None

    def end(self, reason):
        self.ending = reason
        self.over.set()

    def fail(self, cause):
        self.ending = cause
        self.over.set()

    def wait(self) -> list[int]:
        assert self.over.wait(20)
        return self.tokens


def request(prompt, tokens=12, settings=GREEDY, seed=None, seconds=60.0, replies=1, at_token=None, **parts):
    """The sequences of a request and their listeners. `prompt`: ids, or a `Prompt`."""
    if not isinstance(prompt, Prompt):
        ids = prompt.flatten().tolist()
        prompt = Prompt(ids, np.array(ids))
    listeners = [Listener(at_token) for _ in range(replies)]
    deadline = time.monotonic() + seconds
    sequences = [
        Sequence(prompt, one, Sampler(settings, None if seed is None else seed + at), tokens, deadline, **parts)
        for at, one in enumerate(listeners)
    ]
    return sequences, listeners


def ask(engine, prompt, *args, **kwargs):
    sequences, listeners = request(prompt, *args, **kwargs)
    engine.submit(sequences)
    return sequences[0], listeners[0]


def alone(model, prompt, tokens=12) -> list[int]:
    """What the model says without the engine."""
    with torch.inference_mode():
        output = model.generate(prompt.view(1, -1), max_new_tokens=tokens, do_sample=False)
    return [token for token in output[0, prompt.numel() :].tolist() if token != EOS]


LENGTHS = (5, 30, 11, 3, 9, 1)


def test_together_as_alone(engine, model):
    prompts = [words(length, seed=length) for length in LENGTHS]
    asked = [ask(engine, prompt, 12) for prompt in prompts]
    for prompt, (_, listener) in zip(prompts, asked):
        said = alone(model, prompt, 12)
        assert listener.wait() == said
        assert listener.ending == ("length" if len(said) == 12 else "stop")
    assert engine.counts["steps"] < engine.counts["tokens_said"] / 2  # several in most steps
    assert engine.running == engine.waiting == 0


def test_a_prompt_that_nobody_waits_for_is_read_in_long_pieces(engine, model, monkeypatch):
    read, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **given: read.append(given["input_ids"].shape[1]) or forward(**given))
    prompt = words(8 * engine.chunk, seed=6)
    _, listener = ask(engine, prompt, 1)
    listener.wait()
    assert read == [padded(len(prompt))]
    _, other = ask(engine, words(5, seed=7), 200)
    while not other.tokens:
        time.sleep(0.001)
    read.clear()
    _, listener = ask(engine, words(8 * engine.chunk, seed=8), 1)
    listener.wait()
    assert other.ending is None and max(read) <= padded(engine.chunk)


def test_others_come_and_go(engine, model):
    first, other = words(20, seed=1), words(7, seed=2)
    _, listener = ask(engine, first, 20)
    leaving = [ask(engine, other, 60) for _ in range(3)]
    while len(leaving[0][1].tokens) < 3:
        time.sleep(0.001)
    for sequence, _ in leaving:
        sequence.cancelled = True
    _, late = ask(engine, other, 5)
    assert late.wait() == alone(model, other, 5)
    assert listener.wait() == alone(model, first, 20)
    assert all(one.ending is None for _, one in leaving)


def test_a_dialogue_is_not_read_again(engine, model):
    prompt = words(20, seed=3)
    _, listener = ask(engine, prompt, 10)
    said = torch.tensor(listener.wait())
    follow = torch.cat((prompt, said, words(6, seed=4)))
    engine.counts.clear()
    sequence, listener = ask(engine, follow, 10)
    assert listener.wait() == alone(model, follow, 10)
    assert sequence.cached == len(prompt) + len(said) - 1  # the last token was said, and not read
    assert engine.counts["prompt_tokens_read"] == len(follow) - sequence.cached
    longer = torch.cat((follow[:4], words(200, seed=5)))  # much more than what is known
    sequence, listener = ask(engine, longer, 3)
    assert listener.wait() == alone(model, longer, 3) and sequence.cached >= 4
    sequence, listener = ask(engine, prompt, 3)  # a known prompt: its last token has to be read for the logits
    assert listener.wait() == said[:3].tolist() and sequence.cached == len(prompt) - 1


def test_what_another_is_reading_now_serves_too(engine, model):
    prompt = words(40, seed=5)
    _, first = ask(engine, prompt, 200)
    while not first.tokens:
        time.sleep(0.001)
    other = torch.cat((prompt[:30], words(5, seed=6)))
    sequence, second = ask(engine, other, 5)
    assert second.wait() == alone(model, other, 5)
    assert 30 <= sequence.cached < 35


def test_several_replies_to_one_prompt(engine, model):
    prompt = words(13, seed=7)
    sequences, listeners = request(prompt, 8, Settings(temperature=1.0, top_p=1.0), seed=5, replies=3)
    engine.submit(sequences)
    said = [listener.wait() for listener in listeners]
    assert engine.counts["prompt_tokens_read"] == 13 and len(set(map(tuple, said))) == 3
    _, again = ask(engine, prompt, 8, Settings(temperature=1.0, top_p=1.0), seed=6)
    assert again.wait() == said[1]


def test_a_seed_means_the_same_in_company(engine):
    settings, prompt = Settings(temperature=1.0, top_p=0.9), words(9, seed=8)
    _, lonely = ask(engine, prompt, 20, settings, seed=11)
    lonely.wait()
    others = [ask(engine, words(n, seed=n), 40, settings, seed=n) for n in (4, 25)]
    _, accompanied = ask(engine, prompt, 20, settings, seed=11)
    assert accompanied.wait() == lonely.tokens
    _, different = ask(engine, prompt, 20, settings, seed=12)
    assert different.wait() != lonely.tokens
    for _, other in others:
        other.wait()


@pytest.mark.parametrize("engine", [{"end_ids": []}], indirect=True)
def test_a_long_prompt_does_not_stop_others(engine):
    _, talking = ask(engine, words(4, seed=9), 10_000, seconds=20)
    while len(talking.tokens) < 3:
        time.sleep(0.001)
    before = len(talking.tokens)
    _, reading = ask(engine, words(100, seed=10), 1)
    reading.wait()
    between = sum(1 for moment in talking.times[before:] if moment < reading.times[0])
    assert between >= 100 // 8 - 2


@pytest.mark.parametrize("engine", [{"cache_tokens": 45}], indirect=True)
@pytest.mark.parametrize("kept", [0, 1000])
def test_the_youngest_wait_when_the_cache_is_full(engine, model, kept):
    engine.slack, engine.prefixes = 4, Prefixes(kept)
    prompts = [words(10, seed=n) for n in (4, 5, 6)]
    asked = [ask(engine, prompt, 16) for prompt in prompts]
    for prompt, (_, listener) in zip(prompts, asked):
        assert listener.wait() == alone(model, prompt, 16)
    assert engine.counts["preempted"] > 0


@pytest.mark.parametrize("engine", [{"cache_tokens": 40}], indirect=True)
def test_a_reply_ends_where_the_cache_does(engine):
    _, listener = ask(engine, words(30, seed=1), 60)
    assert len(listener.wait()) == 10 and listener.ending == "length"


def test_the_native_kernels_serve_it(tiny_checkpoint):
    model = KimiK26ForConditionalGeneration.from_pretrained(tiny_checkpoint)
    engine = Engine(model, [], rows=3)
    engine.start()
    prompt = words(9, seed=1)
    _, lonely = ask(engine, prompt, 50)
    with torch.inference_mode():  # in this thread at the same time: the kernels serve one after the other
        wanted = model.generate(prompt[None], max_new_tokens=50, do_sample=False, eos_token_id=-1)[0, 9:].tolist()
    assert lonely.wait() == wanted
    asked = [ask(engine, words(n, seed=n), 5)[1] for n in (4, 6, 5)]
    assert [len(listener.wait()) for listener in asked] == [5, 5, 5]
    if library() is not None:
        assert model.language_model.model.native is not None
    engine.close()
    assert engine.join(10)


# -- pictures ---------------------------------------------------------------------------------------------------------


def seen(seed: int) -> tuple[Prompt, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A prompt with two clips, and the inputs of the model it stands for."""
    ids, pixels, grids = media_prompt(seed)
    ids[ids == EOS] = 0
    listed, clips, place = ids[0].tolist(), [], 0
    for patches, grid in zip(pixels.split(grids.prod(-1).tolist()), grids):
        start = listed.index(MEDIA, place)
        tokens = int(grid[1] * grid[2]) // 4
        clips.append(Clip(patches, grid.unsqueeze(0), start, tokens))
        place = start + tokens
    digests = [int(clip.pixel_values.sum() * 1000) % 2**40 for clip in clips]
    return Prompt(listed, prompt_keys(listed, clips, digests), clips), ids, pixels, grids


@pytest.mark.parametrize("engine", [{"chunk": 3}, {"chunk": 64}], indirect=True)
def test_pictures(engine, model):
    for seed in (1, 2, 1):
        prompt, ids, pixels, grids = seen(seed)
        if seed == 2:  # the same words, other pictures
            first = seen(1)[0]
            prompt = Prompt(first.ids, prompt_keys(first.ids, prompt.clips, [4, 5]), prompt.clips)
            ids = torch.tensor([first.ids])
        with torch.inference_mode():
            wanted = model.generate(ids, pixel_values=pixels, grid_thws=grids, max_new_tokens=6, do_sample=False)
        sequence, listener = ask(engine, prompt, 6)
        said = wanted[0, ids.shape[1] :].tolist()
        assert listener.wait() == [token for token in said if token != EOS]
        before = prompt.clips[0].start
        assert sequence.cached == {1: sequence.cached, 2: before}[seed]
    assert sequence.cached == len(prompt.ids) - 1  # seen before: not encoded again


# -- trouble ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [{"rows": 1, "queue": 2, "end_ids": []}], indirect=True)  # nothing ends by itself
def test_a_full_queue_and_time_that_is_over(engine):
    _, running = ask(engine, words(4), 10_000, seconds=1.0)
    while not running.tokens:
        time.sleep(0.001)
    _, patient = ask(engine, words(5), 2, seconds=30)
    _, hasty = ask(engine, words(6), 2, seconds=0.05)
    with pytest.raises(QueueFull):
        ask(engine, words(7), 2)
    hasty.over.wait(5)
    assert hasty.ending == "timeout" and not hasty.tokens
    assert len(patient.wait()) == 2 and running.ending == "timeout"


def test_stopping(model):
    engine = Engine(model, [EOS], rows=1)
    engine.start()
    _, short = ask(engine, words(4), 30)
    _, waits = ask(engine, words(5), 5)
    engine.close()
    with pytest.raises(Stopped):
        ask(engine, words(6), 5)
    assert engine.join(10) and short.ending == waits.ending == "length"
    engine = Engine(model, [], rows=1)
    engine.start()
    asked = [ask(engine, words(n), 100_000)[1] for n in (4, 5)]
    while not asked[0].tokens:
        time.sleep(0.001)
    engine.close(halt=True)
    assert engine.join(10) and [one.ending for one in asked] == ["stopped", "stopped"]


class Faulty:
    """A model that goes wrong for some prompts: by an error while it reads, by an error in a step, by numbers that are none."""

    def __init__(self, model):
        self.model, self.device, self.dtype, self.config = model, model.device, model.dtype, model.config
        self.fault = None

    def __call__(self, input_ids, **inputs):
        reads = input_ids.shape[1] > 1
        if self.fault == ("reading" if reads else "step"):
            raise RuntimeError("out of memory, say")
        output = self.model(input_ids=input_ids, **inputs)
        if self.fault == "numbers" and not reads:
            self.fault = None
            output.logits[0] = torch.nan
            inputs["past_key_values"].layers[0].keys[0] = torch.nan
        return output


@pytest.mark.parametrize("fault", ["reading", "step", "numbers"])
def test_a_fault_takes_only_those_it_met(model, fault):
    faulty = Faulty(model)
    engine = Engine(faulty, [EOS], rows=3, prefix_tokens=0)
    engine.start()
    prompts = [words(6, seed=n) for n in range(3)]
    running = [ask(engine, prompt, 2000)[1] for prompt in prompts[:2]]
    while not all(one.tokens for one in running):
        time.sleep(0.001)
    faulty.fault = fault
    if fault == "reading":
        assert ask(engine, prompts[2], 3)[1].wait() == []
    else:
        assert running[0].over.wait(5) and running[0].ending == "error"
    faulty.fault = None
    assert ask(engine, prompts[2], 12)[1].wait() == alone(model, prompts[2], 12)
    assert (running[1].ending == "error") == (fault == "step")
    engine.close(halt=True)
    assert engine.join(10)


# -- the cache --------------------------------------------------------------------------------------------------------


def test_a_step_copies_nothing(model):
    cache = RowCache(3)
    rows = [[(torch.randn(n, 16), torch.randn(n, 4)) for _ in range(3)] for n in (9, 4, 6)]
    for row in rows:
        cache.add_row(row)
    moved = Counter()
    with torch.inference_mode():
        for _ in range(40):
            places = [layer.keys.data_ptr() for layer in cache.layers]
            positions, mask = cache.begin_step(torch.device("cpu"))
            model(words(3, 1), position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache.end_step()
            moved[places != [layer.keys.data_ptr() for layer in cache.layers]] += 1
    assert cache.lengths == [49, 44, 46] and moved[True] <= 1
    for row, contents in enumerate(rows):
        for (latents, rotary), (kept, kept_rotary) in zip(contents, cache.row(row), strict=True):
            assert torch.equal(kept[: len(latents)], latents) and torch.equal(kept_rotary[: len(rotary)], rotary)


def test_room_is_given_back():
    cache = RowCache(1)
    cache.add_row([(torch.ones(60_000, 2), torch.ones(60_000, 1))])
    cache.add_row([(torch.full((3, 2), 7.0), torch.full((3, 1), 8.0))])
    assert cache.layers[0].buffers[0].shape[2] > 60_000
    cache.remove_row(0)
    assert cache.layers[0].buffers[0].shape[2] < 1000 and cache.lengths == [3]
    assert torch.equal(cache.row(0)[0][0], torch.full((3, 2), 7.0))


def contents(keys) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Latents that say which tokens they are of."""
    return [(torch.as_tensor(keys).view(-1, 1), -torch.as_tensor(keys).view(-1, 1))] * 2


def known(kept: Prefixes, keys, running=()) -> int:
    """How many tokens are known, whose latents must be theirs."""
    keys = np.array(keys)
    length, pieces = kept.find(keys, running)
    for layer in zip(*pieces):
        latents, rotary = map(torch.cat, zip(*layer))
        assert latents.flatten().tolist() == (-rotary).flatten().tolist() == keys[:length].tolist()
    assert bool(pieces) == bool(length)
    return length


def test_kept_prefixes():
    kept = Prefixes(budget=30, dialogues=3)

    def add(*runs):
        keys = np.concatenate([np.arange(*run) for run in runs])
        kept.add(keys, contents(keys))

    assert known(kept, range(5)) == 0
    add((0, 10))
    add((0, 5))  # known already
    add((0, 15))  # goes on from the first
    assert len(kept) == 1 and kept.tokens == 15 and known(kept, range(20)) == 15
    add((0, 8), (50, 54))  # begins as the first does: that is kept once
    assert len(kept) == 2 and kept.tokens == 15 + 4
    assert known(kept, [*range(8), 50, 51, 52, 9]) == 11 and known(kept, range(12)) == 12 and known(kept, [3]) == 0
    assert known(kept, range(30, 40), [(np.arange(30, 36), contents(range(30, 36)))]) == 6  # of a row at work
    add((100, 110))
    known(kept, range(15))  # of use: the others are older now
    add((200, 205))
    assert [known(kept, k) for k in ([*range(8), 50], range(100, 110), range(15), range(200, 205))] == [8, 10, 15, 5]
    assert kept.tokens == 30 and len(kept) == 3
    add((300, 400))  # more than the budget
    assert kept.tokens == 30
    for start in (500, 600, 700):
        add((start, start + 2))
    assert len(kept) == 3 and kept.tokens == 6
    add((900, 930))
    assert len(kept) == 1 and kept.tokens == 30


def test_kept_prefixes_at_random():
    draw = np.random.default_rng(0)
    kept, said = Prefixes(budget=60, dialogues=6), []
    for _ in range(400):
        keys = draw.integers(0, 3, draw.integers(1, 16))
        kept.add(keys, contents(keys))
        said.append(keys.tolist())
        assert known(kept, keys) == len(keys) and len(kept) <= 6 and kept.tokens <= 60
        other = draw.integers(0, 3, 12).tolist()
        assert known(kept, other) <= max(next((n for n in range(12) if k[: n + 1] != other[: n + 1]), 12) for k in said)
    assert kept.tokens == sum(len(run.keys) for run in kept._runs)


# -- sampling ---------------------------------------------------------------------------------------------------------


def draws(logits: torch.Tensor, settings: Settings, count: int) -> Counter:
    samplers = [Sampler(settings, seed) for seed in range(count)]
    return Counter(one.token for one in sample(logits.expand(count, -1), samplers, [None] * count))


@pytest.mark.parametrize("size", [50, 600])
@pytest.mark.parametrize("settings", [{"top_p": 1.0}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.9}, {"min_p": 0.3, "top_p": 1.0}])
def test_tokens_are_drawn_as_they_should(size, settings):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) * (1.0 if size < 100 else 0.1)
    settings = Settings(temperature=0.7, **settings)
    wanted = (logits / 0.7).double().softmax(-1)
    if settings.top_k:
        wanted[wanted < wanted.topk(settings.top_k).values[-1]] = 0
    wanted[wanted < settings.min_p * wanted.max()] = 0
    wanted /= wanted.sum()
    if settings.top_p < 1:
        ordered, ids = wanted.sort(descending=True)
        few = int((ordered.cumsum(0) < settings.top_p).sum()) + 1
        wanted[ids[few:]] = 0
        wanted /= wanted.sum()
    got = torch.zeros(size, dtype=torch.float64)
    for token, count in draws(logits, settings, 1500).items():
        got[token] = count / 1500
    assert set(got.nonzero().flatten().tolist()) <= set(wanted.nonzero().flatten().tolist())
    top = wanted.topk(5).indices
    assert torch.allclose(got[top], wanted[top], atol=0.05)


def test_penalties_bias_and_log_probabilities():
    logits = torch.tensor([2.0, 1.9, 0.0, -3.0])
    penalized = Sampler(Settings(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.3))
    assert [sample(logits[None], [penalized], [None])[0].token for _ in range(4)] == [0, 1, 0, 1]
    biased = Sampler(Settings(temperature=0.0, logit_bias={3: 100.0, 0: -100.0}, top_logprobs=2))
    told = sample(logits[None], [biased], [None])[0]
    assert told.token == 3 and told.logprob == pytest.approx(float(logits.log_softmax(-1)[3]), abs=1e-5)
    assert [token for token, _ in told.top] == [0, 1]
    assert told.top[0][1] == pytest.approx(float(logits.log_softmax(-1)[0]), abs=1e-5)
    assert torch.equal(logits, torch.tensor([2.0, 1.9, 0.0, -3.0]))  # left as they were


def test_seeds_below_zero_are_seeds_of_their_own():
    first = [Sampler(Settings(), seed).random.random() for seed in range(-5, 6)]
    assert len(set(first)) == 11 and first == [Sampler(Settings(), seed).random.random() for seed in range(-5, 6)]
