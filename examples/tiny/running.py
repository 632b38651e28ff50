"""The training loop: one process per core, the same weights in each, gradients averaged after every step.

A run has three parts: seeing alone, dialogues of all kinds, and a last part that begins anew from the weights which the
checkpoint would have, with calmer rates and `LAST_MIX`. So a checkpoint can also be taken through the last part alone.
"""

import ctypes
import multiprocessing
import os
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AttentionInterface

from kimi_k26 import KimiK26Config, KimiK26ForConditionalGeneration

from .batches import make_batches, make_sights
from .learning import (
    Optimizer,
    StackedExperts,
    add_sight,
    balance_loss,
    causal_attention,
    forward,
    media_features,
    moe_layers,
    sight_loss,
    start_weights,
    take_weights,
)
from .mixes import EASY_MIX, LAST_MIX, MIX
from .settings import model_config
from .vocabulary import encoding

WARMUP, DECAY_FROM, INT4_FROM = 30, 0.6, 0.5  # steps; shares of the run
EASY_STEPS = 500  # with dialogues of `EASY_MIX`
LAST_RATE, LAST_MINUTES = 0.2, 0.27  # of the last part: learning rate over that before, share of the run's time
SIGHTS_PER_STEP = 64  # pictures and films of a step before the dialogues begin, in each process
SEEING = ("vision_tower", "mm_projector", "sight")  # the parts that learn then
SIGHT_WEIGHT = 0.5  # of the loss that reads figures off media tokens, beside the words' own
BIAS_STEP = 2e-3  # by which the correction bias moves, at full learning rate
SAVE_EVERY = 180  # seconds


def build(ranks: dict[bytes, int], seed: int, checkpoint: Path | None = None):
    """The model in bfloat16 as it is trained: experts stacked, attention of its own. New weights, or a checkpoint's."""
    AttentionInterface.register("causal", causal_attention)
    torch.manual_seed(seed)
    config = KimiK26Config(**model_config(len(ranks), quantized=False))
    model = KimiK26ForConditionalGeneration(config)
    for layer in moe_layers(model):
        layer.experts = StackedExperts(config.text_config)
    add_sight(model)
    start_weights(model)
    if checkpoint is not None:
        take_weights(model, KimiK26ForConditionalGeneration.from_pretrained(checkpoint, dtype="auto"))
    model.config.text_config._attn_implementation = "causal"
    return model.to(torch.bfloat16)


def rate_factor(step: int, progress: float, decay_from: float) -> float:
    """The learning rate's course over a part of the run: a short rise, constant to `decay_from`, then straight down to 0."""
    fall = min(1.0, max(0.0, (1 - progress) / (1 - decay_from)))
    return min(1.0, (step + 1) / WARMUP) * fall


@dataclass
class Clock:
    """How far a run is, by its steps or by its time, whichever is further.

    `last_from`: step and seconds at which the last part began, None before it.
    """

    steps: int  # of the whole run
    last_steps: int  # of them in the last part
    seconds: float  # at most, of the whole run
    last_from: tuple[int, float] | None = None

    def progress(self, step: int, spent: float) -> float:
        """Of the part that is running, from 0 to 1."""
        if self.last_from is None:
            return max(step / max(1, self.steps - self.last_steps), spent / ((1 - LAST_MINUTES) * self.seconds))
        step, spent = step - self.last_from[0], spent - self.last_from[1]
        return max(step / max(1, self.last_steps), spent / max(1e-9, self.seconds - self.last_from[1]))


def state_path(out: Path) -> Path:
    """Where a run that writes the checkpoint `out` keeps what it needs to go on: beside it, for it is no part of it."""
    return out.with_name(f"{out.name}-training.pt")


class Scores:
    """Per skill, how many dialogues were right to the last token, and the loss, since they were last asked for."""

    def __init__(self):
        self.rows = defaultdict(lambda: [0, 0, 0.0])  # right, all, loss

    def add(self, skills: list[str], rows: torch.Tensor, losses: torch.Tensor, right: torch.Tensor) -> None:
        count = torch.bincount(rows, minlength=len(skills)).clamp(min=1)
        loss = torch.zeros(len(skills)).index_add(0, rows, losses) / count
        wrong = torch.zeros(len(skills)).index_add(0, rows, (~right).float())
        for skill, one, errors in zip(skills, loss.tolist(), wrong.tolist()):
            record = self.rows[skill]
            record[0] += errors == 0
            record[1] += 1
            record[2] += one

    def take(self) -> dict:
        rows, self.rows = dict(self.rows), defaultdict(lambda: [0, 0, 0.0])
        return rows


def merge_scores(parts: list[dict]) -> dict:
    merged = defaultdict(lambda: [0, 0, 0.0])
    for part in parts:
        for skill, record in part.items():
            merged[skill] = [a + b for a, b in zip(merged[skill], record)]
    return {skill: (right / total, loss / total) for skill, (right, total, loss) in sorted(merged.items())}


def keep_memory() -> None:
    """Ask glibc not to hand freed memory back at once: big tensors come and go every step, and fresh pages are slow."""
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        for name, value in ((trim_threshold, 2**31 - 1), (top_pad, 2**26), (mmap_threshold, 2**31 - 1)):
            tune(name, value)


def end_with_parent() -> None:
    """End this process when the one that began it has ended, however that came: nobody else would."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def work(rank: int, world: int, options, ranks: dict[bytes, int]) -> None:
    """What each process does; process 0 also shows progress and saves the state."""
    end_with_parent()
    keep_memory()
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["MASTER_PORT"] = str(options.port)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    model = build(ranks, options.seed, options.start)
    optimizer = Optimizer(model, options.matrix_rate, options.other_rate, decay=0.02)
    coder, first = encoding(ranks), len(ranks)
    layers, top_k = moe_layers(model), model.config.text_config.num_experts_per_tok
    clock = Clock(options.steps, options.last, options.minutes * 60, None if options.start is None else (0, 0.0))
    step, spent, worked, history = 0, 0.0, 0.0, []
    state_file = state_path(options.out)
    if options.resume and state_file.exists():
        state = torch.load(state_file, weights_only=False)
        optimizer.restore(state["optimizer"])
        step, spent, worked, history = (state[key] for key in ("step", "spent", "worked", "history"))
        clock.last_from = state["last_from"]
        for layer, bias in zip(layers, state["biases"]):
            layer.gate.e_score_correction_bias.data.copy_(bias)
    sights: list[float] = []
    scores, begun, saved = Scores(), time.monotonic() - spent, time.monotonic()
    worked -= time.process_time()
    bar = tqdm(total=options.steps, initial=step, disable=rank > 0, smoothing=0.02, mininterval=5)
    while True:
        # Process 0 keeps the clock, for all must agree on the learning rate and on the end.
        now = torch.tensor([time.monotonic() - begun])
        dist.broadcast(now, 0)
        spent = float(now)
        if clock.last_from is None and clock.progress(step, spent) >= 1:
            clock.last_from = (step, spent)
            optimizer = Optimizer(model, options.matrix_rate, options.other_rate, decay=0.02)
        progress, last = clock.progress(step, spent), clock.last_from is not None
        stop = step >= options.until or last and progress >= 1
        if stop or (step and step % options.log_every == 0 and (not history or history[-1]["step"] != step)):
            parts = [None] * world
            dist.all_gather_object(parts, scores.take())
            if rank == 0:
                note(history, step, spent, merge_scores(parts), layers, sights, bar)
            sights = []
        if rank == 0 and (stop or time.monotonic() - saved > SAVE_EVERY):
            save_state(state_file, optimizer, layers, step, spent, worked + time.process_time(), history, clock)
            saved = time.monotonic()
        if stop:
            break
        optimizer.int4 = last or progress >= INT4_FROM
        seeing = not last and step < options.seeing
        if seeing:
            factor = rate_factor(step, 0, DECAY_FROM)
            batches = [make_sights(options.seed, step, rank, SIGHTS_PER_STEP)]
        else:
            begin = clock.last_from[0] if last else options.seeing
            top, decay_from = (LAST_RATE, 0.0) if last else (1.0, DECAY_FROM)
            factor = top * rate_factor(step - begin, progress, decay_from)
            mix = LAST_MIX if last else EASY_MIX if step - begin < EASY_STEPS else MIX
            batches = make_batches(coder, options.seed, step, rank, world, options.rows, options.parts, mix)
        sight_weight = 0.0 if options.start else SIGHT_WEIGHT  # no checkpoint has the layer that reads them off
        # All words of a step weigh the same, whoever has them; so do all media tokens.
        words, media = sum(int((batch.labels >= 0).sum()) for batch in batches), sum(len(b.sights) for b in batches)
        totals = torch.tensor([words, media], dtype=torch.float64)
        dist.all_reduce(totals)
        words, media = (totals / world).clamp(min=1).tolist()
        for batch in batches:
            if seeing:
                loss = sight_loss(model, media_features(model, batch), batch.sights)
                loss.backward()
                sights.append(float(loss.detach()))
                continue
            logits, labels, rows, routers, seen = forward(model, batch, first + 21, first + 255, options.aux_loss_alpha > 0)
            losses = F.cross_entropy(logits, labels, reduction="none")
            loss = losses.sum() / words + sight_weight * len(batch.sights) / media * seen
            if routers:
                loss = loss + options.aux_loss_alpha * balance_loss(routers, top_k) / len(batches)
            loss.backward()
            if batch.clips:
                sights.append(float(seen.detach()))
            scores.add(batch.skills, rows, losses.detach(), logits.argmax(-1) == labels)
        # One message for all gradients and the experts' loads.
        learning = {n: p for n, p in optimizer.live.items() if not seeing or n.startswith(SEEING)}
        sent = [torch.zeros_like(optimizer.master[n]) if p.grad is None else p.grad.float() for n, p in learning.items()]
        sizes = [part.numel() for part in sent]
        flat = torch.cat([*(part.flatten() for part in sent), *(layer.experts.load for layer in layers)])
        dist.all_reduce(flat)
        *parts, loads = flat.split([*sizes, len(flat) - sum(sizes)])
        gradients = {n: (part / world).view_as(p) for (n, p), part in zip(learning.items(), parts)}
        norm = torch.sqrt(sum(part.square().sum() for part in parts)) / world
        if norm > 1:
            for gradient in gradients.values():
                gradient.div_(norm)
        optimizer.step(gradients, factor, rank, world)
        for parameter in optimizer.live.values():
            parameter.grad = None
        for layer, load in zip(layers, loads.view(len(layers), -1)):
            # Auxiliary-loss-free balance (DeepSeek-V3, section 2.1.2): too little work, a better chance; and back.
            layer.gate.e_score_correction_bias.data += BIAS_STEP * max(factor, 0.1) * torch.sign(load.mean() - load)
            if not seeing:
                layer.seen = 0.98 * getattr(layer, "seen", load) + 0.02 * load
            layer.experts.load.zero_()
        step += 1
        bar.update()
    bar.close()
    dist.destroy_process_group()


def note(history: list, step: int, spent: float, scores: dict, layers, sights: list[float], bar) -> None:
    share = min((float(layer.seen.min() / layer.seen.mean()) for layer in layers if hasattr(layer, "seen")), default=1.0)
    seen = sum(sights) / max(1, len(sights))
    history.append({"step": step, "seconds": spent, "scores": scores, "least_used_expert": share, "sight": seen})
    told = " ".join(f"{skill} {100 * right:.0f}%/{loss:.2f}" for skill, (right, loss) in scores.items())
    bar.write(f"step {step}, {spent / 60:.1f} min, least used expert {share:.2f}, sight {seen:.2f}: {told}")


def save_state(path: Path, optimizer, layers, step: int, spent: float, worked: float, history: list, clock: Clock) -> None:
    """`spent`: seconds of the clock; `worked`: seconds of one core, which a busy machine does not lengthen."""
    biases = [layer.gate.e_score_correction_bias.data.clone() for layer in layers]
    state = {"step": step, "spent": spent, "worked": worked, "history": history, "biases": biases}
    state |= {"optimizer": optimizer.state(), "last_from": clock.last_from}
    temporary = path.with_suffix(".new")
    torch.save(state, temporary)
    temporary.replace(path)
