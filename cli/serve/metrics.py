"""Counts and times, in the text form that Prometheus reads."""

from bisect import bisect_left
from collections import Counter

import psutil

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Histogram:
    """How many times lay below each bound."""

    def __init__(self):
        self._counts, self._sum = [0] * (len(SECONDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str, about: str) -> list[str]:
        lines, total = [f"# HELP {name} {about}", f"# TYPE {name} histogram"], 0
        for bound, count in zip((*SECONDS, "+Inf"), self._counts):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """What the server counts itself; the engine has its own counts."""

    def __init__(self):
        self.answers: Counter[int] = Counter()  # by HTTP status
        self.left = 0  # clients that went before their answer was complete
        self.prompt_tokens = 0
        self.first_token, self.whole = Histogram(), Histogram()

    def text(self, engine) -> str:
        counts = engine.counts
        lines = ["# HELP kimi_requests_total Requests by HTTP status.", "# TYPE kimi_requests_total counter"]
        lines += [f'kimi_requests_total{{status="{status}"}} {n}' for status, n in sorted(self.answers.items())]
        counters = {
            "clients_left_total": ("Clients that left before their answer was complete.", self.left),
            "prompt_tokens_total": ("Tokens of all prompts.", self.prompt_tokens),
            "prompt_tokens_read_total": ("Prompt tokens that went through the model.", counts["prompt_tokens_read"]),
            "prompt_tokens_reused_total": ("Prompt tokens known from before.", counts["prompt_tokens_reused"]),
            "prompt_seconds_total": ("Seconds in which prompts went through the model.", counts["reading_seconds"]),
            "completion_tokens_total": ("Tokens said.", counts["tokens_said"]),
            "steps_total": ("Steps of the batch.", counts["steps"]),
            "step_seconds_total": ("Seconds in which replies were decoded.", counts["stepping_seconds"]),
            "preempted_total": ("Replies sent back to wait as the cache was full.", counts["preempted"]),
            "failed_total": ("Replies that failed inside.", counts["failed_error"]),
        }
        gauges = {
            "running": ("Replies being read or decoded.", engine.running),
            "waiting": ("Replies in the queue.", engine.waiting),
            "prefix_tokens": ("Tokens of answered dialogues that are kept.", engine.prefixes.tokens),
            "resident_bytes": ("Resident memory of the process.", psutil.Process().memory_info().rss),
        }
        for kind, values in (("counter", counters), ("gauge", gauges)):
            for name, (about, value) in values.items():
                lines += [f"# HELP kimi_{name} {about}", f"# TYPE kimi_{name} {kind}", f"kimi_{name} {value}"]
        lines += self.first_token.lines("kimi_first_token_seconds", "From the request to its first token.")
        lines += self.whole.lines("kimi_answer_seconds", "From the request to the end of its answer.")
        return "\n".join(lines) + "\n"
