"""The store of experts: their weights as kernels want them, as many as memory is meant to hold."""

import ctypes
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional as F

from .compiling_kimi_k26 import address, i64
from .memory_kimi_k26 import release
from .native_kimi_k26 import NativeAddresses, is_as_written, is_plain, is_readable, library
from .quantization_kimi_k26 import VALUES_PER_WORD, CpuInt4, KimiK26Int4Linear, int4_linear
from .triton_kimi_k26 import grouped_experts, table_for


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ALIGNMENT = 16  # bytes, of the tensors inside one piece of memory: the widest loads of a kernel


class ExpertStore:
    """Experts in the layout a kernel wants, as many as a budget of bytes holds.

    Everything here is derived from the checkpoint's tensors, and can be dropped and made again. Where not all fit, the
    often used stay: a new one takes the place of the least recently used only when it has been asked for more often.

    Args:
        budget (`int`, *optional*): bytes; without one, everything that was ever used stays.

    Experts that compute on an accelerator have a store of their own there, with its own budget and counts: see [`on`].

    Attributes:
        hits, misses (`int`): how often an expert was there, or had to be made.
        bytes_moved (`int`): bytes of the layouts made.
        bytes_held (`int`): bytes of the layouts kept.
    """

    FORGET_AFTER = 2**16  # look-ups until all counts are halved, so that old habits fade

    def __init__(self, budget: int | None = None):
        self.budget = budget
        self.elsewhere: dict[torch.device, ExpertStore] = {}
        self.total: int | None = None  # bytes of all experts there are, where known
        self.cleared = 0  # times
        self.lock = threading.RLock()  # held by who looks up, keeps or drops, and by a step that finds its experts by itself
        self.clear()

    @property
    def bounded(self) -> bool:
        """Whether the budget may not hold all experts there are."""
        return self.budget is not None and (self.total is None or self.total > self.budget)

    def on(self, device: torch.device) -> "ExpertStore":
        """The store of what is held on a device; this one is that of main memory."""
        if device.type == "cpu":
            return self
        return self.elsewhere.setdefault(device, ExpertStore())

    def clear(self):
        """Drop everything and begin to count anew, after a step that other threads may be computing."""
        for other in self.elsewhere.values():
            other.clear()
        with self.lock:
            self.cleared += 1
            self.hits = self.misses = self.bytes_moved = self.bytes_held = 0
            self._kept: OrderedDict = OrderedDict()  # key -> (stamp, layout), least recently used first
            self._asked: Counter = Counter()

    def __reduce__(self):  # a copy, of the model or in a file, makes its own layouts
        return ExpertStore, (self.budget,), {"elsewhere": self.elsewhere, "total": self.total}

    def get(self, key, stamp, make: Callable):
        """The layout under `key`; made by `make()` where it is not there or was made of other tensors (`stamp`)."""
        with self.lock:
            return self._get(key, stamp, make)

    def _get(self, key, stamp, make: Callable):
        self._asked[key] += 1
        if (self.hits + self.misses) % self.FORGET_AFTER == self.FORGET_AFTER - 1:
            self._asked = Counter({k: n // 2 for k, n in self._asked.items() if n > 1})
        found = self._kept.get(key)
        if found is not None and found[0] == stamp:
            self.hits += 1
            self._kept.move_to_end(key)
            return found[1]
        if found is not None:
            self._drop(key)
        self.misses += 1
        layout = make()
        self.bytes_moved += layout.nbytes
        if self._make_room(key, layout.nbytes):
            self._kept[key] = (stamp, layout)
            self.bytes_held += layout.nbytes
        return layout

    def _make_room(self, key, size: int) -> bool:
        while self.budget is not None and self.bytes_held + size > self.budget:
            coldest = next(iter(self._kept), None)
            if coldest is None or self._asked[coldest] >= self._asked[key]:
                return False
            self._drop(coldest)
        return True

    def keeps(self, key) -> bool:
        """Whether there is a layout under `key`, current or not."""
        return key in self._kept

    def held(self, key, stamp):
        """The layout under `key`, or `None`, as [`get`] would find it; does not count as use."""
        found = self._kept.get(key)
        return found[1] if found is not None and found[0] == stamp else None

    def _drop(self, key):
        layout = self._kept.pop(key)[1]
        self.bytes_held -= layout.nbytes
        layout.drop()


class Layout:
    """An expert as a kernel wants it, `nbytes` large."""

    nbytes = 0

    def drop(self):
        """Give back what freeing the object alone does not."""


class NativeExpert(Layout):
    """A routed expert, a [`KimiK26MLP`], for the native kernels, which read the checkpoint's own tensors: their addresses.

    What is held or dropped are the pages of memory that the files' bytes have been read into.

    Args:
        expert: whose weights they are.
        tensors: as `weights_of` gives them.
        hidden, expert_width, group_size: what the kernels take the shapes of the weights from; a size of 0 for plain ones.
    """

    def __init__(self, expert: nn.Module, tensors: list[torch.Tensor], hidden: int, expert_width: int, group_size: int):
        self.expert = expert
        self.nbytes = sum(tensor.nbytes for tensor in tensors)
        dtypes = (torch.int32, torch.bfloat16) if len(tensors) == 6 else (torch.bfloat16,)
        self.usable = all(is_readable(tensor, dtypes[k % len(dtypes)]) for k, tensor in enumerate(tensors))
        per_number = (VALUES_PER_WORD, group_size) if group_size else (1,)
        shapes = [(outputs, inputs // per) for outputs, inputs in [(expert_width, hidden)] * 2 + [(hidden, expert_width)] for per in per_number]
        self.usable &= [tuple(tensor.shape) for tensor in tensors] == shapes
        self._at = [tensor.data_ptr() for tensor in tensors]
        with_scales = self._at if len(tensors) == 6 else [value for at in self._at for value in (at, None)]  # none: bfloat16
        self._addresses = NativeAddresses(*with_scales)
        self.address = ctypes.addressof(self._addresses)
        self._memory = [tensor.detach() for tensor in tensors]  # stays while the kernels may read it, whatever is put in its place

    def is_current(self) -> bool:
        """Whether the expert's weights are still these."""
        tensors = weights_of(self.expert)
        return tensors is not None and [t.data_ptr() for t in tensors] == self._at

    def drop(self):
        release(self.expert)


class KnownExperts:
    """Of one layer's [`KimiK26Experts`] those that the native kernels find by themselves: a table of addresses by number. Whoever
    asks or changes it holds the store's `lock`.

    Attributes:
        address (`int`): of the table, which never moves; null for an expert that is not known.
    """

    def __init__(self, experts: nn.ModuleList):
        self._experts, self._store, self._cleared, self._next = experts, None, 0, 0
        self._table = (ctypes.c_void_p * len(experts))()
        self._held: dict[int, NativeExpert] = {}
        self.address = ctypes.addressof(self._table)

    def find(self, number: int) -> NativeExpert | None:
        """A known expert, or one from the store, which is known from then on unless a budget has the store asked each time;
        `None` where it has adapters or hooks or lies elsewhere."""
        held = self._held.get(number)
        if held is not None:
            self._store.hits += 1
            return held
        held = self._experts.native(number)
        if held is not None and not self._store.bounded:
            self._hold(number, held)
        return held

    def learn(self, numbers: Iterable[int]) -> bool:
        """Let experts be known until `let_go`; false where one has adapters or hooks or lies elsewhere."""
        for number in numbers:
            held = self.find(number)
            if held is None:
                return False
            self._hold(number, held)
        return True

    def _hold(self, number: int, held: NativeExpert):
        self._held[number], self._table[number] = held, held.address

    def follow(self):
        """Forget all when the store was cleared or replaced."""
        store = self._experts.store
        if store is not self._store or store.cleared != self._cleared:
            self._store, self._cleared = store, store.cleared
            self._forget(list(self._held))

    def refresh(self):
        """Forget those that are no longer as they were, too."""
        self.follow()
        self._forget([number for number, held in self._held.items() if not self._is_current(number, held)])

    def _is_current(self, number: int, held: NativeExpert) -> bool:
        return self._experts._modules[str(number)] is held.expert and held.is_current()

    def one_is_current(self) -> bool:
        """Whether one of them, each at its turn, is as it was."""
        self._next = (self._next + 1) % len(self._experts)
        number = self._next if self._next in self._held else next(iter(self._held), None)
        return number is None or self._is_current(number, self._held[number])

    def let_go(self):
        """After use: under a budget the store decides what stays in memory, and must be asked each time."""
        if self._held and self._store.bounded:
            self._experts.let_go(self._held)
            self._forget(list(self._held))

    def _forget(self, numbers: list[int]):
        for number in numbers:
            self._table[number] = None
        if numbers:
            library().kimi_unready(i64(0), address(self.address))  # a graph may be reading them
        for number in numbers:
            del self._held[number]


class CpuExpert(Layout):
    """A routed expert in the layout of PyTorch's INT4 product for the CPU, gate and up in one."""

    def __init__(self, expert: nn.Module):
        parts = (expert.gate_proj, expert.up_proj, expert.down_proj)
        words, scales = [p.weight_packed for p in parts], [p.weight_scale for p in parts]
        self.gate_up = CpuInt4(torch.cat(words[:2]), torch.cat(scales[:2]))
        self.down = CpuInt4(words[2], scales[2])
        self.nbytes = self.gate_up.nbytes + self.down.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class DeviceExpert(Layout):
    """A routed expert's weights on another device, as they are in the checkpoint, in one piece of its memory.

    Args:
        expert ([`KimiK26MLP`]): with its weights in main memory, best of all page-locked.
        device (`torch.device`): where they go; nobody waits for them to arrive.
    """

    def __init__(self, expert: nn.Module, device: torch.device):
        projections = (expert.gate_proj, expert.up_proj, expert.down_proj)
        names = ("weight_packed", "weight_scale") if type(projections[0]) is KimiK26Int4Linear else ("weight",)
        self.linear = int4_linear if len(names) > 1 else F.linear
        parts = [[getattr(projection, name).detach() for name in names] for projection in projections]
        places = list(accumulate((_aligned(part.nbytes) for each in parts for part in each), initial=0))
        self.nbytes = held_bytes(places[-1])
        piece, places = torch.empty(self.nbytes, dtype=torch.uint8, device=device), iter(places)

        def send(part):
            at = next(places)
            there = piece[at : at + part.nbytes].view(part.dtype).view(part.shape)
            return there.copy_(part, non_blocking=True)

        self.weights = [[send(part) for part in each] for each in parts]
        self.table = table_for(device, [[part for each in self.weights for part in each]])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is not None and self.table.serves(x):
            weights = x.new_ones(len(x), 1, dtype=torch.float32)
            return grouped_experts(x, weights, torch.zeros_like(weights, dtype=torch.int64), self.table)
        gate, up, down = self.weights
        return self.linear(F.silu(self.linear(x, *gate)) * self.linear(x, *up), *down)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def held_bytes(nbytes: int) -> int:
    """What `nbytes` take on an accelerator: PyTorch gives out large pieces of memory in units of 2 MiB."""
    unit = 2**21 if nbytes >= 2**20 else 2**9
    return -(-nbytes // unit) * unit


def weights_of(expert: nn.Module) -> list[torch.Tensor] | None:
    """Words and scales, or plain weights, of gate, up and down; `None` if an expert has biases, hooks or adapters besides, or is
    another network."""
    if type(expert).__name__ != "KimiK26MLP" or not is_as_written(type(expert)) or tuple(expert._modules) != PROJECTIONS:
        return None
    tensors = []
    for projection in expert._modules.values():
        if not is_plain(projection) or type(projection) not in (nn.Linear, KimiK26Int4Linear):
            return None
        if projection._parameters.get("bias") is not None:
            return None
        names = ("weight_packed", "weight_scale") if type(projection) is KimiK26Int4Linear else ("weight",)
        tensors += [projection._parameters[name] for name in names]
    return tensors if is_plain(expert) else None
