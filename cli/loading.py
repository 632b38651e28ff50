"""What commands load: the options for it, and the processor and model of a checkpoint."""

import argparse
from pathlib import Path

from . import CommandError


def positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"a positive whole number is needed, not {text!r}")
    return int(text)


def between(low: float, high: float, kind: type = float):
    """What reads a number of this kind, of these bounds or in between."""

    def number(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            named = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"a {named} from {low:g} to {high:g} is needed, not {text!r}")
        return value

    return number


def add_options(parser) -> None:
    """The options of `load_checkpoint`, by its names."""
    group = parser.add_argument_group("the model")
    dtypes = ("auto", "bfloat16", "float16", "float32")
    group.add_argument("--dtype", default="auto", choices=dtypes, help="of plain weights; auto is the checkpoint's (%(default)s)")
    group.add_argument("--memory", metavar="SIZE", help="main memory for weights, such as 48GiB")
    group.add_argument("--expert-budget", metavar="SIZE", help="memory for prepared experts")
    group.add_argument("--threads", type=between(1, 1024, int), help="of PyTorch on a CPU")


def end_ids(model) -> list[int]:
    """The tokens that end a reply: those of `generation_config.json`, else those of the config."""
    ends = model.generation_config.eos_token_id
    ends = model.config.eos_token_id if ends is None else ends
    return list(ends) if isinstance(ends, (list, tuple)) else [ends]


def load_checkpoint(
    folder: Path,
    dtype: str = "auto",
    memory: str | None = None,
    expert_budget: str | None = None,
    threads: int | None = None,
):
    """Processor and model of a checkpoint, on the accelerators there are, else on the CPU.

    Args:
        folder: with this project's code attached or not.
        dtype: of plain weights, by its name in PyTorch; `"auto"` is the checkpoint's own.
        memory: main memory for weights, such as `"48GiB"`; accelerators are used whatever it is.
        expert_budget: memory for prepared experts.
        threads: of PyTorch on a CPU.

    Returns:
        `(KimiK26Processor, KimiK26ForConditionalGeneration)`.

    Raises:
        CommandError: naming the folder and what is wrong with it or with an option.
    """
    import torch
    from accelerate.utils import get_max_memory

    from .. import KimiK26ForConditionalGeneration, KimiK26Processor
    from ..loading_kimi_k26 import as_bytes
    from ..placement_kimi_k26 import FREE_ON_ACCELERATORS

    if not folder.is_dir():
        raise CommandError(f"{folder} is not a folder")
    for option, size in (("--memory", memory), ("--expert-budget", expert_budget)):
        try:
            as_bytes(0 if size is None else size, option)
        except ValueError as error:
            raise CommandError(str(error)) from None
    if threads:
        torch.set_num_threads(threads)
    budgets = {"expert_budget": expert_budget}
    if memory:  # devices that are not named beside it would not be used
        free = get_max_memory() if torch.accelerator.is_available() else {}
        budgets["max_memory"] = {device: int(amount * FREE_ON_ACCELERATORS) for device, amount in free.items()}
        budgets["max_memory"]["cpu"] = memory
    try:
        processor = KimiK26Processor.from_pretrained(folder)
        model = KimiK26ForConditionalGeneration.from_pretrained(
            folder,
            dtype=dtype,
            device_map="auto",
            **{key: value for key, value in budgets.items() if value is not None},
        ).eval()
    except (ValueError, TypeError, AttributeError, OSError) as error:  # of the last but one: a dtype that PyTorch has not
        raise CommandError(f"{folder} cannot be loaded: {error}") from error
    return processor, model
