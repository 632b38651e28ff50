"""Which device holds what: a plan at the grain of experts, from sizes and memory alone, and carrying it out.

A token passes the layers one after the other, so a map of whole layers lets one device work at a time. Here the
experts of every layer are dealt to all devices, which then work on every token together. What every token reads
(attention, norms, routers, shared experts) stays on the first device that has room for all of it: spreading it by layer
would not let two devices work at once either, and would move the hidden state at each step. Only where no device has
that room is it laid out in the order of the layers over several.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Optional, Union

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook
from accelerate.utils import PrefixedDataset, get_max_memory
from torch import nn

from .experts_kimi_k26 import KimiK26MoE
from .store_kimi_k26 import held_bytes


Device = Union[int, str, torch.device]  # a key of `max_memory`, a value of `device_map`
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
OFFLOADED = ("cpu", "disk")  # the places that compute nothing where there are accelerators
OF_AN_EXPERT = re.compile(r"\.experts\.\d+(\.|$)")
# Of what is free, where nobody says more: activations and kernels take some of an accelerator's memory, and in main
# memory all programs live.
FREE_ON_ACCELERATORS, FREE_IN_MAIN_MEMORY = 0.9, 0.7
FREE_FOR_CACHE = 2**15  # tokens whose latents are to fit beside the weights
FETCHED_AT_ONCE = 2  # experts for which an accelerator keeps room beside those it holds


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts.

    Attributes:
        blocks (`dict[str, dict[str, int]]`): all but the routed experts, in the order of use; what is placed together
            (`"layers.3"`) as module → bytes.
        experts (`dict[str, list[int]]`): module of the experts of a layer → bytes of each.
        beside (`float`): what each layer reads for a token beside its experts and at the same time (the shared one), in
            experts.
        chosen (`int`): experts that a layer reads for a token.
    """

    blocks: dict[str, dict[str, int]]
    experts: dict[str, list[int]] = field(default_factory=dict)
    beside: float = 0.0
    chosen: int = 1

    @classmethod
    def of(cls, model: nn.Module) -> "Sizes":
        """Those of a `KimiK26ForConditionalGeneration`, which may be on `meta`: INT4 words count as they are stored."""
        blocks, experts, shared = {}, {}, 0
        for name, module in _blocks(model):
            mixture = getattr(module, "mlp", None)
            if isinstance(mixture, KimiK26MoE):
                experts[f"{name}.mlp.experts"] = [_bytes(expert) for expert in mixture.experts]
                parts = {f"{name}.{n}": m for n, m in module.named_children() if m is not mixture}
                parts |= {f"{name}.mlp.{n}": m for n, m in mixture.named_children() if m is not mixture.experts}
                shared = _bytes(mixture.shared_experts) if mixture.shared_experts is not None else 0
            else:
                parts = {name: module}
            blocks[name] = {n: _bytes(m) for n, m in parts.items()}
        largest = max((max(each) for each in experts.values()), default=0)
        beside = shared / largest if largest else 0.0
        return cls(blocks, experts, beside, model.config.text_config.num_experts_per_tok)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _blocks(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The parts of a model in the order of use; a decoder layer is one."""
    text = model.language_model.model
    for name in ("vision_tower", "mm_projector"):
        if getattr(model, name) is not None:
            yield name, getattr(model, name)
    yield "language_model.model.embed_tokens", text.embed_tokens
    for index, layer in enumerate(text.layers):
        yield f"language_model.model.layers.{index}", layer
    yield "language_model.model.norm", text.norm
    yield "language_model.lm_head", model.language_model.lm_head


# The plan


def plan(sizes: Sizes, max_memory: dict[Device, int], strategy: str = "auto") -> dict[str, Device]:
    """A device map at the grain of experts.

    Every accelerator gets as many experts of each layer as let all of them read the same amount for a token, as far as
    there is room; what none has room for goes to main memory, and what that has no room for stays on disk.

    Args:
        sizes ([`Sizes`]): of the model.
        max_memory (`dict`): device → bytes of weights it may hold; accelerators by number or name, `"cpu"`. In order.
        strategy (`str`): `"auto"` and `"balanced"` as said; `"balanced_low_0"` leaves the first accelerator, which
            computes all but the experts, without any while the others have room; `"sequential"` fills one after the
            other.

    Returns:
        `dict`: module → device. Every parameter of the model is in exactly one of the modules.

    Raises:
        ValueError: for a strategy or an amount of memory that there is not.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"device_map must be one of {', '.join(STRATEGIES)} or a dict, got {strategy!r}")
    for device, amount in max_memory.items():
        if not isinstance(amount, int) or amount < 0:
            raise ValueError(f"max_memory[{device!r}] must be a number of bytes from 0 on, got {amount!r}")
    accelerators = [device for device in max_memory if device not in OFFLOADED]
    room = {device: max_memory[device] for device in accelerators}
    blocks = {name: sum(parts.values()) for name, parts in sizes.blocks.items()}
    places = _lay_out(blocks, room)
    if accelerators and None in places.values():  # these pass through the first one, each at its turn
        passing = max(size for name, size in blocks.items() if places[name] is None)
        places = _lay_out(blocks, room | {accelerators[0]: room[accelerators[0]] - passing})
        room[accelerators[0]] = max(0, room[accelerators[0]] - passing)
    left = max_memory.get("cpu", 0)
    device_map = {}
    for name, parts in sizes.blocks.items():
        if places[name] is None:
            places[name] = "cpu" if blocks[name] <= left else "disk"
            left -= blocks[name] if places[name] == "cpu" else 0
        else:
            room[places[name]] -= blocks[name]
        device_map |= dict.fromkeys(parts, places[name])

    quotas = _quotas(sizes, room, places, strategy)
    dealt = deal(quotas, sum(len(each) for each in sizes.experts.values()))
    for layer, each in sizes.experts.items():
        for number, size in enumerate(each):
            device = next(dealt)
            if device is None:
                device = "cpu" if size <= left else "disk"
                left -= size if device == "cpu" else 0
            device_map[f"{layer}.{number}"] = device
    return device_map


def _lay_out(blocks: dict[str, int], room: dict[Device, int]) -> dict[str, Optional[Device]]:
    """All blocks on the first device with room for them, else in order on one after the other; `None` has no room."""
    total = sum(blocks.values())
    for device, free in room.items():
        if total <= free:
            return dict.fromkeys(blocks, device)
    places, devices = {}, iter(room.items())
    device, free = next(devices, (None, 0))
    for name, size in blocks.items():
        while device is not None and size > free:
            device, free = next(devices, (None, 0))
        places[name], free = device, free - size
    return places


def _quotas(sizes: Sizes, room: dict[Device, int], places: dict[str, Device], strategy: str) -> dict[Device, int]:
    """How many experts each device gets; under `None` those that no accelerator has room for."""
    total = sum(len(each) for each in sizes.experts.values())
    largest = max((held_bytes(max(each)) for each in sizes.experts.values()), default=1)
    fits = {device: max(0, free) // largest for device, free in room.items()}
    if sum(fits.values()) < total:
        fits = {device: max(0, count - FETCHED_AT_ONCE) for device, count in fits.items()}
        return fits | {None: total - sum(fits.values())}
    if strategy == "sequential":
        quotas, rest = {}, total
        for device, count in fits.items():
            quotas[device] = min(count, rest)
            rest -= quotas[device]
        return quotas
    # What a device reads beside its experts counts as experts that it has already.
    layers = [layer.removesuffix(".mlp.experts") for layer in sizes.experts]
    there = {device: sum(places[layer] == device for layer in layers) for device in room}
    per_layer = total / max(1, len(layers)) * sizes.beside / sizes.chosen
    ahead = {device: count * per_layer for device, count in there.items()}
    if strategy == "balanced_low_0":
        ahead[next(iter(room))] = total + max(ahead.values())
    return _level(total, fits, ahead)


def _level(total: int, fits: dict[Device, int], ahead: dict[Device, float]) -> dict[Device, int]:
    """`total` things for devices that can take so many and have so many already, as evenly as can be."""
    quotas, rest = dict.fromkeys(fits, 0), total
    while rest:
        # The emptiest are filled up to the next emptiest, or evenly by what is left.
        load = {device: ahead[device] + quotas[device] for device in fits if quotas[device] < fits[device]}
        lowest = min(load.values())
        level = [device for device in load if load[device] <= lowest + 1]
        above = min((value for device, value in load.items() if device not in level), default=float("inf"))
        step = max(1, int(min(above - lowest, rest / len(level), *(fits[d] - quotas[d] for d in level))))
        for device in level:
            given = min(step, rest)
            quotas[device] += given
            rest -= given
    return quotas


def deal(quotas: dict[Device, int], total: int) -> Iterable[Device]:
    """`total` devices, each as often as its quota says and as evenly spread as can be, so that every layer gets a mix."""
    given = dict.fromkeys(quotas, 0)
    for turn in range(1, total + 1):
        open_ = (device for device in quotas if given[device] < quotas[device])
        chosen = max(open_, key=lambda device: quotas[device] * turn / total - given[device])
        given[chosen] += 1
        yield chosen


# Carrying it out


def is_of_experts(device_map) -> bool:
    """Whether a device map is at the grain of experts, with accelerators among its places."""
    if not isinstance(device_map, dict) or not any(OF_AN_EXPERT.search(name) for name in device_map):
        return False
    return any(place not in OFFLOADED and as_device(place).type != "cpu" for place in device_map.values())


def memory(model: nn.Module, given: Optional[dict] = None) -> dict[Device, int]:
    """Bytes of weights that each device may hold: what is given, else what is free less what computing takes.

    Args:
        model (`nn.Module`): for the size of its cache.
        given (`dict`, *optional*): `max_memory` as the library takes it; devices that are not in it are not used.
    """
    if given is not None:
        return get_max_memory(dict(given))
    config = model.config.text_config
    per_token = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * model.dtype.itemsize
    free = get_max_memory()
    first = next((device for device in free if device not in OFFLOADED), None)
    shares = {device: FREE_IN_MAIN_MEMORY if device in OFFLOADED else FREE_ON_ACCELERATORS for device in free}
    amounts = {device: int(amount * shares[device]) for device, amount in free.items()}
    if first is not None:
        amounts[first] = max(0, amounts[first] - per_token * FREE_FOR_CACHE)
    return amounts


def as_device(place: Device) -> torch.device:
    """What a device map calls a device; numbers count the accelerators, and `"disk"` is main memory, mapped.

    Raises:
        ValueError: there is no accelerator, or the place is none for weights.
    """
    if isinstance(place, int):
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None:
            raise ValueError(f"device_map has the place {place}, and there is no accelerator")
        return torch.device(accelerator.type, place)
    device = torch.device("cpu" if place == "disk" else place)
    if device.type == "meta":
        raise ValueError("device_map has the place 'meta', where there are no values")
    return device


def check_map(device_map: dict[str, Device], sizes: Sizes) -> dict[str, Device]:
    """The place of every part of the model by a device map, in which modules stand for all that is in them.

    Raises:
        ValueError: naming the parts that it gives no place, or the entries that are no part of the model.
    """
    parts = [name for parts in sizes.blocks.values() for name in parts]
    parts += [f"{layer}.{number}" for layer, each in sizes.experts.items() for number in range(len(each))]
    places, used = {}, set()
    for part in parts:
        named = next((stem for stem in _stems(part) if stem in device_map), None)
        if named is not None:
            places[part] = device_map[named]
            used.add(named)
    missing = [part for part in parts if part not in places]
    if missing:
        raise ValueError(f"device_map has no place for {missing[0]} and {len(missing) - 1} other parts of the model")
    unknown = sorted(set(device_map) - used)
    if unknown:
        raise ValueError(
            f"device_map has {unknown[0]!r}, which is no part that is placed by itself: those are the routed experts, "
            "the other modules of their layers, whole layers, and the modules beside the layers"
        )
    return places


@dataclass(frozen=True)
class Placement:
    """A device map, and what follows from it.

    Attributes:
        places (`dict[str, Device]`): part of the model → place, see [`check_map`].
        blocks (`dict[str, list[str]]`): the parts outside the experts, by what is placed together.
        main (`torch.device`): takes the inputs, and computes what is kept in main memory or on disk.
        shares (`dict[str, list[tuple[torch.device, dict]]]`): experts of a layer → the numbers (keys) that compute on
            each device. Those that no accelerator holds are dealt to all.
        budgets (`dict[torch.device, int]`): bytes of experts that each accelerator may hold.
    """

    places: dict[str, Device]
    blocks: dict[str, list[str]]
    main: torch.device
    shares: dict[str, list[tuple[torch.device, dict[int, None]]]]
    budgets: dict[torch.device, int]

    @classmethod
    def of(
        cls,
        device_map: dict[str, Device],
        sizes: Sizes,
        max_memory: dict[Device, int],
        expert_budget: Optional[int] = None,
    ) -> "Placement":
        """What a map of devices means for a model of these sizes.

        Args:
            device_map (`dict`): of [`plan`], or a user's own.
            max_memory (`dict`): as in [`plan`]; an accelerator that is not in it holds what the map gives it, and one
                that is in it alone takes part in computing what none holds.
            expert_budget (`int`, *optional*): bytes of experts on each accelerator, instead of what its memory leaves.
        """
        places = check_map(device_map, sizes)
        taken = {as_device(place): 0 for place in (*max_memory, *places.values()) if place not in OFFLOADED}
        counts = dict.fromkeys(taken, 0)
        for parts in sizes.blocks.values():
            for part, size in parts.items():
                if places[part] not in OFFLOADED:
                    taken[as_device(places[part])] += size
        blocks = {block: list(parts) for block, parts in sizes.blocks.items()}
        first = next((places[part] for parts in blocks.values() for part in parts if places[part] not in OFFLOADED), None)
        main = next(iter(taken)) if first is None else as_device(first)

        fetched = 0
        for layer, each in sizes.experts.items():
            for number in range(len(each)):
                place = places[f"{layer}.{number}"]
                if place in OFFLOADED:
                    fetched += 1
                else:
                    counts[as_device(place)] += 1
        rota = deal(_in_proportion(fetched, counts if any(counts.values()) else dict.fromkeys(counts, 1)), fetched)
        shares = {}
        for layer, each in sizes.experts.items():
            groups: dict[torch.device, dict[int, None]] = {}
            for number in range(len(each)):
                place = places[f"{layer}.{number}"]
                groups.setdefault(next(rota) if place in OFFLOADED else as_device(place), {})[number] = None
            home = places[layer.removesuffix(".experts") + ".gate"]
            home = main if home in OFFLOADED else as_device(home)
            # The device that has the tokens is put to work last: the others are idle meanwhile.
            shares[layer] = sorted(groups.items(), key=lambda group: group[0] == home)

        largest = max((held_bytes(max(each)) for each in sizes.experts.values()), default=0)
        aside = FETCHED_AT_ONCE * largest if fetched else 0
        allowed = {as_device(place): amount for place, amount in max_memory.items() if place not in OFFLOADED}
        budgets = {d: max(counts[d] * largest, allowed.get(d, 0) - taken[d] - aside) for d in taken}
        if expert_budget is not None:
            budgets = dict.fromkeys(budgets, expert_budget)
        return cls(places, blocks, main, shares, budgets)

    def device_of(self, module: str) -> Optional[torch.device]:
        """Where the weights of a module are put; `None` leaves them in their file, mapped, as all experts are."""
        if OF_AN_EXPERT.search(module):
            return None
        place = next((self.places[stem] for stem in _stems(module) if stem in self.places), "cpu")
        return None if place in OFFLOADED else as_device(place)

    def carry_out(self, model: nn.Module, progress: Callable = iter):
        """Let a model that has its weights where `device_of` says compute by this plan.

        Args:
            model (`KimiK26ForConditionalGeneration`).
            progress (*optional*): wraps the list of experts that are sent to accelerators, to show how far it is.
        """
        for device, budget in self.budgets.items():
            model.expert_store.on(device).budget = budget
        to_send = []
        for name, shares in self.shares.items():
            experts = model.get_submodule(name)
            experts.shares = shares
            for device, numbers in shares:
                for number in numbers:
                    place = self.places[f"{name}.{number}"]
                    if place not in OFFLOADED:
                        to_send.append((experts, number, device))
                    elif place == "cpu" and torch.accelerator.is_available():
                        _lock_pages(experts[number])
        for experts, number, device in progress(to_send):
            experts.fetch(number, device)
        self._hook(model)
        model.hf_device_map = dict(self.places)

    def _hook(self, model: nn.Module):
        """The library's hooks, on whole blocks: inputs go to a block's device, and weights that no accelerator has room
        for, to where they are used. Where all is on one device, its inputs alone are seen to."""
        skip = model._skip_keys_device_placement
        in_one_place = all(self.device_of(part) == self.main for parts in self.blocks.values() for part in parts)
        for block, parts in self.blocks.items():
            offloaded = [part for part in parts if self.places[part] in OFFLOADED]
            for part in offloaded:
                module = model.get_submodule(part)
                weights = {f"{part}.{name}": parameter.data for name, parameter in module.named_parameters()}
                weights = PrefixedDataset(weights, f"{part}.")
                attach_align_device_hook(module, self.main, offload=True, weights_map=weights, skip_keys=skip)
            module = model.get_submodule(block)
            if not hasattr(module, "_hf_hook") and not (in_one_place and block.startswith("language_model")):
                device = self.device_of(parts[0]) or self.main
                add_hook_to_module(module, AlignDevicesHook(device, skip_keys=skip))
        add_hook_to_module(model, AlignDevicesHook(self.main, io_same_device=True, skip_keys=skip))


def _stems(name: str) -> Iterable[str]:
    """`"a.b.c"` → `"a.b.c"`, `"a.b"`, `"a"`, `""`."""
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def _in_proportion(total: int, weights: dict) -> dict:
    """`total` in whole numbers by weights, which are not all zero."""
    whole, given, shared = sum(weights.values()), 0, {}
    so_far = 0
    for key, weight in weights.items():
        so_far += weight
        shared[key] = total * so_far // whole - given
        given += shared[key]
    return shared


def _lock_pages(expert: nn.Module):
    """Copy weights out of their file into memory that an accelerator reads by itself."""
    for parameter in expert.parameters():
        parameter.data = parameter.data.pin_memory()
