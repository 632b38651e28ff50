"""The training script's parts: its fast ways give what the published classes give, and a stopped run goes on the same."""

import socket
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from kimi_k26 import KimiK26ForConditionalGeneration, KimiK26Processor  # noqa: E402
from kimi_k26.cli.tiny import write_tokenizer  # noqa: E402
from tiny import batches, dialogues, drawing, evaluation, export, learning, mixes, running, vocabulary  # noqa: E402
from tiny.case import render  # noqa: E402

TEMPLATE = Path(__file__).resolve().parents[1] / "chat_template.jinja"
MAKERS = list(dict.fromkeys(maker for maker, _ in mixes.MIX + mixes.LAST_MIX))


@pytest.fixture(scope="module")
def ranks():
    rng = Random(0)
    texts = [text for _ in range(150) for text, _ in render(mixes.draw_case(rng))]
    return vocabulary.learn_ranks(texts, 60)


@pytest.fixture(scope="module")
def model(ranks):
    return running.build(ranks, seed=0)


def state_of(model):
    optimizer = learning.Optimizer(model, 0.02, 0.004, 0.02)
    biases = [layer.gate.e_score_correction_bias.data.clone() for layer in learning.moe_layers(model)]
    return {"optimizer": optimizer.state(), "biases": biases}


@pytest.fixture(scope="module")
def folder(model, ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tokenizer(folder, ranks)
    export.write_checkpoint(export.plain_model(state_of(model), len(ranks), quantized=True), folder, TEMPLATE)
    return folder


def test_the_vocabulary_reads_numbers_digit_by_digit(ranks):
    assert not any(len(piece) > 1 and any(chr(byte).isdigit() for byte in piece) for piece in ranks)
    encoding = vocabulary.encoding(ranks)
    assert len(encoding.encode("9.11")) == 4


@pytest.mark.parametrize("make", MAKERS, ids=lambda maker: maker.__name__)
def test_training_text_is_what_the_processor_gives(make, ranks, folder):
    """Ids, patches and grids of every prompt, and the assistant's words after it."""
    processor, encoding = KimiK26Processor.from_pretrained(folder), vocabulary.encoding(ranks)
    for seed in range(6):
        case = make(Random(seed))
        pieces = render(case)
        assert sum(target for _, target in pieces) == len(case.targets)
        inputs = evaluation.prompt(processor, evaluation.for_processor(case), case)
        text = pieces[0][0]
        assert inputs["input_ids"][0].tolist() == encoding.encode(text, allowed_special="all")
        clips = [clip for item in case.media for clip in batches.media_clips(item)]
        assert [list(grid) for grid, _ in clips] == inputs.get("grid_thws", torch.empty(0, 3)).tolist()
        if clips:
            patches = torch.cat([torch.from_numpy(patches) for _, patches in clips]).float() / 127.5 - 1
            torch.testing.assert_close(patches, inputs["pixel_values"].flatten(1), atol=1e-5, rtol=0)
        ids, labels = batches.encode(encoding, case)
        told = encoding.decode([label for label in labels if label >= 0])
        assert told == "".join(text for text, target in pieces if target)
        assert len(ids) == len(labels)


def test_tool_talk_is_what_the_processor_gives_after_the_result(ranks, folder):
    processor, encoding = KimiK26Processor.from_pretrained(folder), vocabulary.encoding(ranks)
    for seed in range(6):
        case = dialogues.use_tool(Random(seed))
        whole = "".join(text for text, _ in render(case)[:-1])
        inputs = processor.apply_chat_template(
            case.messages[:-1], tools=case.tools, thinking=case.thinking, tokenize=True, return_dict=True
        )
        assert encoding.decode(inputs["input_ids"][0]) == whole


def test_the_training_forward_pass_is_the_models_own(model, ranks, folder):
    """Stacked experts, grouped clips and attention in blocks against the published class, row by row."""
    plain = export.plain_model(state_of(model), len(ranks), quantized=False).float()
    trained = model.float()
    (batch,) = batches.make_batches(vocabulary.encoding(ranks), 0, 0, 0, 1, rows=10, parts=1)
    logits, labels, rows, _, _ = learning.forward(trained, batch, len(ranks) + 21, len(ranks) + 255)
    start = 0
    for row, ids in enumerate(batch.ids):
        real = ids[ids != len(ranks) + 255].unsqueeze(0)
        clips = sorted(
            (first, grid, patches)
            for grid, (pixels, firsts) in batch.clips.items()
            for first, patches in zip(firsts, pixels)
        )
        tokens = int((real == len(ranks) + 21).sum())
        own = [clip for clip in clips if start <= clip[0] < start + tokens]
        start += tokens
        media = {}
        if own:
            pixels = torch.cat([patches for _, _, patches in own]).view(-1, 3, 14, 14).float() / 127.5 - 1
            media = {"pixel_values": pixels, "grid_thws": torch.tensor([grid for _, grid, _ in own])}
        with torch.no_grad():
            expected = plain(input_ids=real, **media).logits[0][batch.labels[row, : real.shape[1]] >= 0]
        torch.testing.assert_close(logits[rows == row], expected, atol=2e-3, rtol=1e-3)
    model.to(torch.bfloat16)


def test_the_int4_file_holds_the_weights_that_were_trained(model, ranks, folder):
    """With `int4` set, training multiplies by exactly what the words in the checkpoint stand for."""
    optimizer = learning.Optimizer(model, 0.02, 0.004, 0.02)
    optimizer.int4 = True
    optimizer.publish()
    loaded = KimiK26ForConditionalGeneration.from_pretrained(folder, dtype="auto")
    for mine, theirs in zip(learning.moe_layers(model), learning.moe_layers(loaded)):
        for at, expert in enumerate(theirs.experts):
            assert torch.equal(expert.gate_proj.dequantize(torch.bfloat16), mine.experts.gate[at])
            assert torch.equal(expert.down_proj.dequantize(torch.bfloat16), mine.experts.down[at])
    optimizer.int4 = False
    optimizer.publish()


def test_a_batch_depends_on_seed_and_step_alone(ranks):
    encoding = vocabulary.encoding(ranks)
    for step in (0, 7):
        first, again = (batches.make_batches(encoding, 3, step, 1, 2, rows=4, parts=1)[0] for _ in range(2))
        assert torch.equal(first.ids, again.ids) and torch.equal(first.labels, again.labels)
        for grid in first.clips:
            assert torch.equal(first.clips[grid][0], again.clips[grid][0])
    other = batches.make_batches(encoding, 3, 8, 1, 2, rows=4, parts=1)[0]
    assert first.ids.shape != other.ids.shape or not torch.equal(first.ids, other.ids)


@pytest.mark.parametrize("parts, world", [(1, 1), (2, 2), (3, 2)])
def test_processes_share_all_dialogues_of_a_step(parts, world, ranks):
    encoding = vocabulary.encoding(ranks)
    shares = [batches.make_batches(encoding, 5, 2, rank, world, rows=12, parts=parts) for rank in range(world)]
    assert all(shares) and sum(len(share) for share in shares) == parts * world
    (whole,) = batches.make_batches(encoding, 5, 2, 0, 1, rows=12 * world, parts=1)

    def dialogues_in(batch):
        return [tuple(row[row != len(ranks) + 255].tolist()) for row in batch.ids]

    assert sorted(row for share in shares for batch in share for row in dialogues_in(batch)) == sorted(dialogues_in(whole))


def test_batches_are_cut_for_the_least_padding():
    rng = Random(0)
    for parts, count, step in ((1, 5, 1), (3, 9, 1), (3, 24, batches.ROWS_STEP), (9, 9, 1)):
        lengths = sorted(16 * rng.randint(1, 20) for _ in range(count))
        cuts = batches.best_cuts(lengths, parts)
        assert [a for a, _ in cuts] == [0, *(b for _, b in cuts[:-1])] and cuts[-1][1] == count and len(cuts) == parts
        ways = ((0, *inside, count) for inside in combinations(range(step, count, step), parts - 1))
        least = min(sum((b - a) * lengths[b - 1] for a, b in zip(way, way[1:])) for way in ways)
        assert sum((b - a) * lengths[b - 1] for a, b in cuts) == least
    assert batches.best_cuts([16, 32], 5) == [(0, 1), (1, 2)]


@pytest.mark.parametrize("length", [1, 7, learning.QUERY_BLOCK, 2 * learning.QUERY_BLOCK + 9])
def test_attention_and_its_gradient_are_pytorchs(length):
    torch.manual_seed(length)
    given = [torch.randn(3, length, width, dtype=torch.float64, requires_grad=True) for width in (12, 12, 8)]
    weight = torch.randn(3, length, 8, dtype=torch.float64)
    results = []
    for attend in (
        lambda *parts: learning.CausalAttention.apply(*parts, 0.3),
        lambda *parts: torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, scale=0.3),
    ):
        out = attend(*given)
        results.append((out, *torch.autograd.grad((out * weight).sum(), given)))
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_processes_find_together_the_directions_of_one(model, monkeypatch):
    torch.manual_seed(0)
    alone, one, two = (learning.Optimizer(model, 0.02, 0.004, 0.02) for _ in range(3))
    gradients = {name: torch.randn_like(master) for name, master in alone.master.items()}
    expected = alone.directions(gradients, 0, 1)
    sent = []
    monkeypatch.setattr(learning.dist, "all_reduce", lambda flat: sent.append(flat.clone()))
    two.directions(gradients, 1, 2)
    assert sent[0].any() and not sent[0].all()
    monkeypatch.setattr(learning.dist, "all_reduce", lambda flat: flat.add_(sent[0]))
    found = one.directions(gradients, 0, 2)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    "first, second, steps, bigger",
    [
        ("9.11", "9.9", "9 = 9. 11, 90: 1 < 9.", "9.9"),
        ("12.5", "9.75", "12 > 9.", "12.5"),
        ("3.140", "3.14", "3 = 3. 140, 140: 1 = 1, 4 = 4, 0 = 0.", None),
        ("0.12", "0.119", "0 = 0. 120, 119: 1 = 1, 2 > 1.", "0.12"),
    ],
)
def test_the_steps_of_a_comparison(first, second, steps, bigger):
    assert dialogues.compare_steps(first, second) == (steps, bigger)


def test_the_judge_accepts_the_right_answer_and_no_other():
    for make in MAKERS:
        for seed in range(30):
            case = make(Random(seed))
            if case.expect is None or "name" in case.expect or "off" in case.tags:
                continue
            assert evaluation.judge(case, case.messages[-1]["content"]), case
            assert not evaluation.judge(case, "I do not know, perhaps 77777."), case


def test_a_model_that_answers_right_is_scored_so(folder, monkeypatch):
    """The whole evaluation with a reply that is always the right one, tool talks of two turns included."""
    processor = KimiK26Processor.from_pretrained(folder)
    for skill in evaluation.SKILLS:
        cases = [evaluation.SKILLS[skill](Random(seed)) for seed in range(3)]
        told = []
        for case in cases:
            words = [text for text, target in render(case) if target]
            told.append([text.removesuffix("<|im_end|>") for text in words])
        replies = [[words[turn] for words in told] for turn in range(len(told[0]))]
        monkeypatch.setattr(evaluation, "generate", lambda *_: replies.pop(0))
        right = [one for one, _ in evaluation.answer(None, processor, cases)]
        assert right == [not skill.startswith("not kept")] * 3, skill


def test_balance_loss_is_one_when_experts_share_alike():
    logits = torch.eye(4).repeat(8, 1) * 5  # each expert is the choice of a quarter of the tokens
    assert learning.balance_loss([logits], 1).item() == pytest.approx(1.0, abs=1e-5)
    lopsided = torch.zeros(32, 4)
    lopsided[:, 0] = 5
    assert learning.balance_loss([lopsided], 1).item() > 1.2


def test_orthogonal_directions_have_singular_values_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(learning.orthogonal(torch.randn(3, 24, 16)).float())
    assert values.min() > 0.4 and values.max() < 1.4


def test_what_a_media_token_shows():
    """A figure in the second token of two, and one that moves and comes in later in a film of two clips."""
    figure = drawing.Figure("red", "circle", x=42, y=14, radius=9)
    scene = drawing.Scene(56, 28, [figure])
    kind = 1 + drawing.COLOURS.index("red") * len(drawing.SHAPES)
    assert batches.sights_of(scene).tolist() == [[0, 0, -100, -100], [kind, 1, -100, -100]]
    film = drawing.Film(scene, fps=2, total=8, speed=[(-1.0, 0.0)], start=[3.0])
    left = [(0, 0), *drawing.MOVES.values()].index((-1, 0))
    first, second = batches.sights_of(film)[:2], batches.sights_of(film)[2:]
    assert first.tolist() == [[0, 0, -100, -100]] * 2
    assert second.tolist() == [[0, 0, -100, -100], [kind, 1, left, 2]]


def run_to(folder, ranks, until, resume, start=None):
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = SimpleNamespace(
        seed=0, port=port, out=folder, matrix_rate=0.02, other_rate=0.004, minutes=1e6, steps=5, until=until,
        seeing=1, last=2, start=start, rows=3, parts=1, resume=resume, log_every=2, aux_loss_alpha=0.001,
    )  # fmt: skip
    threads = torch.get_num_threads()
    try:
        running.work(0, 1, options, ranks)
    finally:
        torch.set_num_threads(threads)
    return torch.load(running.state_path(folder), weights_only=False)


@pytest.mark.once
def test_a_stopped_and_resumed_run_is_the_run_that_was_not_stopped(ranks, tmp_path):
    """Stopped twice: before the last part and within it."""
    whole = run_to(tmp_path / "whole", ranks, until=5, resume=False)
    run_to(tmp_path / "parts", ranks, until=2, resume=False)
    run_to(tmp_path / "parts", ranks, until=4, resume=True)
    parts = run_to(tmp_path / "parts", ranks, until=5, resume=True)
    assert parts["step"] == whole["step"] == 5 and parts["optimizer"]["int4"]
    assert parts["last_from"][0] == 3 and parts["optimizer"]["steps"] == 2  # of the last part's own
    for name, tensor in whole["optimizer"]["master"].items():
        assert torch.equal(tensor, parts["optimizer"]["master"][name]), name
    assert all(torch.equal(a, b) for a, b in zip(whole["biases"], parts["biases"]))
    assert [note["step"] for note in whole["history"]] == [2, 4, 5]


def test_the_last_part_goes_on_from_a_checkpoints_weights(model, ranks, folder, tmp_path):
    """What training begins with is what the checkpoint holds; the first step then moves it."""
    begun = running.build(ranks, 1, folder)
    loaded = KimiK26ForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert torch.equal(begun.language_model.lm_head.weight, loaded.language_model.lm_head.weight)
    for mine, theirs in zip(learning.moe_layers(begun), learning.moe_layers(loaded)):
        assert torch.equal(mine.gate.e_score_correction_bias, theirs.gate.e_score_correction_bias)
        assert torch.equal(mine.experts.up[1], theirs.experts[1].up_proj.dequantize(torch.bfloat16))
    state = run_to(tmp_path / "on", ranks, until=1, resume=False, start=folder)
    assert state["step"] == 1 and state["last_from"] == (0, 0.0) and state["optimizer"]["int4"]
    name = "language_model.lm_head.weight"
    moved = (state["optimizer"]["master"][name] - dict(begun.named_parameters())[name].float()).abs()
    assert 0 < moved.max() < 0.01


LINGER = """
import sys, time
sys.path.insert(0, {examples!r})
from multiprocessing import get_context
from tiny.running import end_with_parent

def linger():
    end_with_parent()
    print("lingers", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    process = get_context("spawn").Process(target=linger)
    process.start()
    process.join()
"""


@pytest.mark.once
def test_a_process_ends_with_the_one_that_began_it(tmp_path):
    script = tmp_path / "linger.py"
    script.write_text(LINGER.format(examples=str(EXAMPLES)))
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"lingers\n"
    parent.kill()
    assert parent.stdout.read() == b""  # ends when the last process that could write has ended
    parent.wait()
