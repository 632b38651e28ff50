"""The next token of each row: every row by its own settings and its own random numbers."""

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

import numpy as np
import torch

# So many of the likeliest tokens nearly always hold the whole nucleus; where they do not, all are sorted.
LIKELIEST = 256


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen.

    temperature: 0 takes the likeliest. top_p, top_k (0: all), min_p (of the likeliest's probability): what is left out.
    presence_penalty, frequency_penalty: taken off the logits of what the reply has said. logit_bias: added, by id.
    top_logprobs: how many alternatives are told with each token, or None for no log probabilities.
    """

    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    top_logprobs: Optional[int] = None


class Sampled(NamedTuple):
    """A token; with log probabilities its own and those of the likeliest `(id, log probability)`, before any setting."""

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The settings of one reply and its random numbers: the same seed gives the same reply, whoever else is at work."""

    def __init__(self, settings: Settings, seed: Optional[int] = None):
        self.settings = settings
        self.random = random.Random(None if seed is None else seed % 2**64)  # which takes −3 for 3 otherwise
        self.said: Counter[int] = Counter()

    def note(self, token: int) -> None:
        """What the reply says, where a penalty depends on it."""
        if self.settings.presence_penalty or self.settings.frequency_penalty:
            self.said[token] += 1

    def adjust(self, logits: torch.Tensor) -> None:
        """Penalties and bias, on one row `(vocabulary,)` in place."""
        settings = self.settings
        if self.said:
            ids = torch.tensor(list(self.said), device=logits.device)
            counts = torch.tensor(list(self.said.values()), device=logits.device)
            logits[ids] -= settings.presence_penalty + settings.frequency_penalty * counts
        for index, bias in settings.logit_bias.items():
            logits[index] += bias

    def pick(self, ids: np.ndarray, probabilities: np.ndarray, whole: bool) -> Optional[int]:
        """One of the likeliest tokens, at random.

        Args:
            ids, probabilities: `(some,)`, falling; of all tokens where `whole`.

        Returns:
            The id; `None` where these tokens do not decide and the others are needed.
        """
        settings = self.settings
        if settings.top_k:
            if settings.top_k > len(ids) and not whole:
                return None
            ids, probabilities, whole = ids[: settings.top_k], probabilities[: settings.top_k], True
            probabilities = probabilities / probabilities.sum()
        if settings.min_p:
            few = int((probabilities >= settings.min_p * probabilities[0]).sum())
            if few == len(ids) and not whole:
                return None
            ids, probabilities, whole = ids[:few], probabilities[:few], True
            probabilities = probabilities / probabilities.sum()
        sums = probabilities.cumsum()
        if settings.top_p < 1.0:
            few = int(np.searchsorted(sums, settings.top_p)) + 1
            if few > len(ids) and not whole:
                return None
            sums, whole = sums[:few], True
        state = self.random.getstate()
        point = self.random.random() * (sums[-1] if whole else 1.0)
        place = int(np.searchsorted(sums, point, side="right"))
        if place >= len(sums) and not whole:
            self.random.setstate(state)
            return None
        return int(ids[min(place, int(np.searchsorted(sums, sums[-1])))])  # never one of no probability


def sample(logits: torch.Tensor, samplers: list[Sampler], guides: list) -> list[Optional[Sampled]]:
    """The next token of every row.

    Args:
        logits: `(rows, vocabulary)`, floating point.
        samplers: one for each row.
        guides: for each row what forbids tokens (`restrict(logits)` on `(vocabulary,)`, in place), or None.

    Returns:
        A `Sampled` for each row; `None` for a row whose logits are not finite.
    """
    logits = logits.float()
    telling = [row for row, sampler in enumerate(samplers) if sampler.settings.top_logprobs is not None]
    told = _logprobs(logits, telling, max((samplers[row].settings.top_logprobs for row in telling), default=0))
    usable = logits.amax(-1).isfinite().tolist()  # NaN spreads through a maximum, and so does +inf
    logits = logits.clone()
    for row, (sampler, guide) in enumerate(zip(samplers, guides)):
        sampler.adjust(logits[row])
        if guide is not None:
            guide.restrict(logits[row])
    tokens = logits.argmax(-1).tolist()
    random_rows = [row for row, s in enumerate(samplers) if s.settings.temperature > 0 and usable[row]]
    if random_rows:
        temperatures = torch.tensor([samplers[row].settings.temperature for row in random_rows], device=logits.device)
        warm = logits[random_rows] / temperatures.unsqueeze(1)
        total = warm.logsumexp(-1, keepdim=True)
        some = min(LIKELIEST, warm.shape[1])
        values, ids = warm.topk(some)
        values, ids = (values - total).exp().double().cpu().numpy(), ids.cpu().numpy()
        for at, row in enumerate(random_rows):
            token = samplers[row].pick(ids[at], values[at], some == warm.shape[1])
            if token is None:
                ordered, places = (warm[at] - total[at]).exp().double().sort(descending=True)
                token = samplers[row].pick(places.cpu().numpy(), ordered.cpu().numpy(), True)
            tokens[row] = token
    sampled: list[Optional[Sampled]] = []
    for row, (sampler, token) in enumerate(zip(samplers, tokens)):
        sampler.note(token)
        if not usable[row]:
            sampled.append(None)
        elif row in told:
            own, likeliest = told[row]
            wanted = sampler.settings.top_logprobs
            sampled.append(Sampled(token, float(own[token]), tuple(likeliest[:wanted])))
        else:
            sampled.append(Sampled(token))
    return sampled


def _logprobs(logits: torch.Tensor, rows: list[int], top: int) -> dict[int, tuple[torch.Tensor, list]]:
    """By row: the log probabilities of all tokens `(vocabulary,)`, and the `top` likeliest with theirs."""
    if not rows:
        return {}
    logprobs = logits[rows].log_softmax(-1)
    values, ids = logprobs.topk(min(top, logprobs.shape[1]))
    likeliest = [list(zip(i, v)) for i, v in zip(ids.tolist(), values.tolist())]
    return {row: (logprobs[at], likeliest[at]) for at, row in enumerate(rows)}
