"""Router and experts: which feed-forward networks a token passes through, and their products."""

from collections.abc import Callable, Collection, Iterable
from functools import cached_property, partial
from itertools import accumulate, cycle
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_kimi_k26 import KimiK26TextConfig
from .decoding_kimi_k26 import apply_linear
from .memory_kimi_k26 import read_ahead, release
from .native_kimi_k26 import INPUTS, FeedForward, is_plain, knows_group, library, weighted_experts
from .parallel_kimi_k26 import Peers
from .quantization_kimi_k26 import CpuInt4, KeepDtype, KimiK26Int4Linear
from .store_kimi_k26 import CpuExpert, DeviceExpert, ExpertStore, KnownExperts, NativeExpert, weights_of
from .triton_kimi_k26 import FEW_TOKENS, ExpertTable, grouped_experts, has_kernels, picked_experts, picks, table_for


# Up to this many rows the CPU's INT4 product is faster than unpacking the words and multiplying.
FEW_ROWS = 48
ROWS_AT_ONCE = 4096  # by the native kernels, which hold what is inside of the experts for all of them
GUESSED_ROWS = 4  # up to so many, what the next layer may want is few experts, and they are read ahead
CHECKED_ROWS = 64  # from so many on, looking at every expert takes little beside computing them


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32, in which norms, softmax, router and sums are computed; float64 where the model itself is in float64."""
    return torch.promote_types(dtype, torch.float32)


class KimiK26MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`: a dense layer's network, a shared expert, or one routed expert.

    Args:
        hidden_size (`int`), intermediate_size (`int`): widths.
        group_size (`int`, *optional*): inputs per scale when the three weights are INT4 words; `None` for plain ones.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, group_size: int | None = None):
        super().__init__()

        def linear(inputs, outputs):
            if group_size is None:
                return nn.Linear(inputs, outputs, bias=False)
            return KimiK26Int4Linear(inputs, outputs, group_size)

        self.gate_proj = linear(hidden_size, intermediate_size)
        self.up_proj = linear(hidden_size, intermediate_size)
        self.down_proj = linear(intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.silu(apply_linear(self.gate_proj, x)) * apply_linear(self.up_proj, x)
        return apply_linear(self.down_proj, inner)


class KimiK26Router(KeepDtype):
    """Scores every expert for every token and picks the experts of each.

    The choice follows `sigmoid(logits) + e_score_correction_bias`; the weights are the plain scores of the chosen
    (DeepSeek-V3, arXiv:2412.19437, section 2.1.2: the bias balances load and carries no gradient). With `n_group`
    above 1 only the `topk_group` groups with the largest sum of their two best choices take part.
    """

    kept = {"e_score_correction_bias": torch.float32}

    def __init__(self, config: KimiK26TextConfig):
        super().__init__()
        self.top_k, self.n_group, self.topk_group = config.num_experts_per_tok, config.n_group, config.topk_group
        self.normalize, self.scaling = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.empty(config.n_routed_experts, dtype=torch.float32)
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            x (`torch.Tensor` of shape `(tokens, hidden_size)`).

        Returns:
            logits `(tokens, experts)` float32, weights `(tokens, top_k)` float32, chosen `(tokens, top_k)` int64.
        """
        given = (x, self.weight, self.e_score_correction_bias)
        if self.n_group <= 1 and type(self.weight) is nn.Parameter and picks(*given) and has_kernels(x.device):
            return picked_experts(*given, self.top_k, self.normalize, self.scaling)
        dtype = at_least_float32(x.dtype)
        with torch.autocast(x.device.type, enabled=False):  # which experts answer must not hang on a rounding
            logits = F.linear(x.to(dtype), self.weight.to(dtype))
        scores = logits.sigmoid()
        choice = scores.detach() + self.e_score_correction_bias
        if self.n_group > 1:
            grouped = choice.unflatten(-1, (self.n_group, -1))  # (tokens, groups, experts of a group)
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.topk_group, dim=-1, sorted=False).indices
            allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
            choice = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
        chosen = choice.topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, chosen)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * self.scaling, chosen


class Routing:
    """Which tokens go to which experts of a layer, and with what weights.

    Args:
        weights (`torch.Tensor` of shape `(tokens, top_k)`, float32), chosen (same shape, int64).
        experts (`int`): how many the layer has.
    """

    def __init__(self, weights: torch.Tensor, chosen: torch.Tensor, experts: int):
        self.weights, self.chosen, self.experts = weights, chosen, experts
        self._asked = self  # where the host's own copies are: one for all devices

    def to(self, device: torch.device) -> "Routing":
        """The same on another device, without waiting for either."""
        if device == self.chosen.device:
            return self
        moved = (part.to(device, non_blocking=True) for part in (self.weights, self.chosen))
        there = Routing(*moved, self.experts)
        there._asked = self._asked
        return there

    @property
    def picked(self) -> list[list[int]]:
        """The experts of each token. The first to ask waits for the device."""
        return self._asked._picked

    @cached_property
    def _picked(self):
        return self.chosen.cpu().tolist()

    @property
    def counts(self) -> list[int]:
        """Tokens of each expert. The first to ask waits for the device."""
        return self._asked._counts

    @cached_property
    def _counts(self):
        return torch.bincount(self.chosen.flatten(), minlength=self.experts).cpu().tolist()

    def by_expert(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The (token, choice) pairs sorted by expert: tokens `(pairs,)` int64, weights `(pairs, 1)` float32."""
        order = self.chosen.flatten().argsort(stable=True)
        return order // self.chosen.shape[1], self.weights.flatten()[order].unsqueeze(-1)


class AbsentExpert(nn.Module):
    """In the place of an expert that another process has."""


class KimiK26Experts(nn.ModuleList):
    """The routed experts of one layer, each a [`KimiK26MLP`] under its number.

    They may live on several devices, or in several processes: each computes its share of every token's sum at the same
    time as the others.
    """

    def __init__(self, config: KimiK26TextConfig):
        sizes = (config.hidden_size, config.moe_intermediate_size, config.int4_group_size)
        super().__init__(KimiK26MLP(*sizes) for _ in range(config.n_routed_experts))
        hidden, width, group = sizes
        self.has_cpu_layout = group is not None and CpuInt4.fits(2 * width, group) and CpuInt4.fits(hidden, group)
        self.has_native_widths = hidden % INPUTS == width % INPUTS == 0 and knows_group(group or 0)
        self.has_native_widths &= width % (group or INPUTS) == hidden % (group or INPUTS) == 0
        self.sizes = {"hidden": hidden, "expert_width": width, "group_size": group or 0}
        self.store = ExpertStore()  # one for all layers, once the model is whole
        # Which experts compute where: (device, their numbers); `None` is wherever the tokens are.
        self.shares: list[tuple[torch.device | None, Collection[int]]] = [(None, range(len(self)))]
        self.peers: Peers | None = None  # the processes that have the experts, where those are several
        self.tables: dict[torch.device, tuple] = {}  # see `table`
        self._known: KnownExperts | None = None
        self.following: tuple[KimiK26Router, KimiK26Experts] | None = None  # router and experts of the next layer

    def __getstate__(self):
        return self.__dict__ | {"tables": {}, "_known": None, "following": None}  # a copy's experts lie elsewhere

    @property
    def known(self) -> KnownExperts:
        """Those that the CPU's kernels find by themselves."""
        with self.store.lock:
            if self._known is None:
                self._known = KnownExperts(self)
            return self._known

    def split(self, peers: Peers):
        """Keep the experts of this process alone."""
        mine = peers.mine(len(self))
        self.peers, self.shares = peers, [(None, mine)]
        for number in range(len(self)):
            if number not in mine:
                self[number] = AbsentExpert()

    def forward(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        chosen: torch.Tensor,
        beside: Callable | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """The weighted sum of each token's experts, added up in float32 (float64 in float64).

        Args:
            x (`torch.Tensor` of shape `(tokens, hidden_size)`).
            weights (`torch.Tensor` of shape `(tokens, top_k)`, float32), chosen (same shape, int64).
            beside (`Callable`, *optional*): gives what is added for every token (the shared expert); it is called before
                the shares of other devices are waited for.
            dtype (`torch.dtype`, *optional*): of the result, that of `x` by default.

        Returns:
            `torch.Tensor` of shape `(tokens, hidden_size)`.
        """
        if torch.compiler.is_dynamo_compiling() and x.device.type == "cpu" and dtype is None and not torch.is_grad_enabled():
            total = opaque_experts(x, weights, chosen, number_of(self))
            return total if beside is None else total + beside()
        if self.peers is not None:
            x, weights = self.peers.sum_gradients(x, weights)
        routing = Routing(weights, chosen, len(self))
        # All is sent out before the first product starts: a copy waits for what its device has been given before.
        sent = []
        for device, numbers in self.shares:
            device = x.device if device is None else device
            sent.append((numbers, x.to(device, non_blocking=True), routing.to(device)))
        parts = [self.share(*one) for one in sent]
        every = beside() if beside is not None else None
        on_accelerator = x.device.type != "cpu"  # main memory is read at once, so what goes there is waited for
        total = parts[0].to(x.device, non_blocking=on_accelerator)
        for part in parts[1:]:
            total = total + part.to(x.device, non_blocking=on_accelerator)
        if self.peers is not None:
            total = self.peers.sum(total, x, weights)
        total = total.to(dtype or x.dtype)
        return total if every is None else total + every

    def share(self, numbers: Collection[int], x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """What the experts `numbers` add to each token's sum, `(tokens, hidden_size)` float32 (float64 in float64)."""
        dtype = at_least_float32(x.dtype)
        if (by_kernels := self.native_share(numbers, x, routing)) is not None:
            return by_kernels.to(dtype)
        table = None if torch.is_grad_enabled() else self.table(numbers, x.device, thorough=len(x) >= CHECKED_ROWS)
        if table is not None and table.serves(x):
            return grouped_experts(x, routing.weights, routing.chosen, table, dtype)
        if x.shape[0] == 1:
            places = [place for place, number in enumerate(routing.picked[0]) if number in numbers]
            if not places:
                return torch.zeros_like(x, dtype=dtype)
            self.announce((routing.picked[0][place] for place in places), x)
            outs = torch.cat([self.run(routing.picked[0][place], x).to(x.device) for place in places])
            weights = routing.weights
            if len(places) < weights.shape[1]:
                weights = torch.cat([weights[:, place : place + 1] for place in places], dim=1)
            return weights @ outs.to(dtype)
        # Each expert sees its tokens as one matrix.
        tokens, factors = routing.by_expert()
        total = torch.zeros_like(x, dtype=dtype)
        ends = list(accumulate(routing.counts))
        self.announce((number for number in numbers if routing.counts[number]), x)
        for number in numbers:
            count, end = routing.counts[number], ends[number]
            if count:
                rows = tokens[end - count : end]
                out = self.run(number, x[rows]).to(x.device, dtype)  # the library's hooks may have it elsewhere
                total = total.index_add(0, rows, out * factors[end - count : end])
        return total

    def run(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """One expert on its rows, by the fastest way there is for them."""
        expert = self[number]
        projections = (expert.gate_proj, expert.up_proj, expert.down_proj)
        as_built = all(type(p) in (nn.Linear, KimiK26Int4Linear) and is_plain(p) for p in projections) and is_plain(expert)
        own = as_built and type(projections[0]) is KimiK26Int4Linear
        few = x.shape[0] <= FEW_ROWS and x.dtype == torch.bfloat16 and x.device.type == "cpu"
        if few and own and self.has_cpu_layout and not (torch.is_grad_enabled() and x.requires_grad):
            stamp = tuple((p.weight_packed.data_ptr(), p.weight_packed._version) for p in projections)
            return self.store.get((id(self), number), stamp, lambda: self._prepare(expert))(x)
        if x.device.type != "cpu" and next(projections[0].parameters()).device.type == "cpu" and is_plain(expert):
            trained = torch.is_grad_enabled() and any(p.requires_grad for p in expert.parameters())
            if as_built and not trained:
                return self.fetch(number, x.device)(x)
            there = {name: p.to(x.device) for name, p in expert.named_parameters()}  # gradients find their way back
            return torch.func.functional_call(expert, there, (x,))
        out = expert(x)
        if own:
            release(expert)
        return out

    def fetch(self, number: int, device: torch.device) -> DeviceExpert:
        """An expert's weights, which are in main memory, on an accelerator: from the store there."""
        expert = self[number]
        return self.store.on(device).get((id(self), number), self._stamp(expert), lambda: self._send(expert, device))

    @staticmethod
    def _stamp(expert: KimiK26MLP) -> tuple:
        """Where an expert's weights lie and how often they have been written to."""
        name = "weight_packed" if type(expert.gate_proj) is KimiK26Int4Linear else "weight"
        weights = (expert.gate_proj._parameters[name], expert.up_proj._parameters[name], expert.down_proj._parameters[name])
        return tuple((weight.data_ptr(), weight._version) for weight in weights)

    def _send(self, expert: KimiK26MLP, device: torch.device) -> DeviceExpert:
        sent = DeviceExpert(expert, device)
        release(expert)  # a copy out of a file has been read by now
        return sent

    def announce(self, numbers: Iterable[int], x: torch.Tensor):
        """Let the system read from the files, all together, the experts that are about to be used one by one.

        Where not all are held, those follow that the next layer's router would choose for the same input: it changes
        little from layer to layer, and the guess is read while this layer computes.

        Args:
            x (`torch.Tensor` of shape `(tokens, hidden_size)`): the input of this layer's experts.
        """
        store = self.store.on(x.device)
        _read_ahead(store, self, numbers)
        if store.bounded and self.following is not None and len(x) <= GUESSED_ROWS:
            router, experts = self.following
            weight, bias = router.weight.detach(), router.e_score_correction_bias
            if is_plain(router) and weight.device == bias.device == x.device:  # else it waits elsewhere for its turn
                scores = F.linear(x.detach(), weight.to(x.dtype)).sigmoid() + bias
                _read_ahead(store, experts, set(scores.topk(router.top_k, dim=-1).indices.flatten().tolist()))

    def table(self, numbers: Collection[int], device: torch.device, thorough: bool) -> ExpertTable | None:
        """Where a GPU's kernels find the experts `numbers`; `None` where it has no kernels or does not hold them all.

        When that is `thorough`, it is looked for at every expert whether something has changed, else at one, each at its
        turn: what is done to all is seen at once.
        """
        table, known, misses, numbers_in_turn = self.tables.get(device, (None, None, None, None))
        if torch.compiler.is_dynamo_compiling():  # a graph keeps to the table that it has met
            return table
        if not has_kernels(device) or known is numbers and table is None and not thorough:
            return None
        now = self.store.on(device).misses
        if table is not None and known is numbers and misses == now:
            asked = numbers if thorough else (next(numbers_in_turn),)
            if all(table.lists(number, self.weights_on(number, device)) for number in asked):
                return table
        weights = {number: self.weights_on(number, device) for number in numbers}
        table = None
        if None not in weights.values():
            table = table_for(device, (weights.get(number) for number in range(len(self))))
        self.tables[device] = table, numbers, now, cycle(numbers)
        return table

    def weights_on(self, number: int, device: torch.device) -> list[torch.Tensor] | None:
        """An expert's weights on a device, its own or what the store there holds; `None` if there are none to read."""
        expert = self._modules[str(number)]
        weights = weights_of(expert)
        if weights is None or weights[0].device == device:
            return weights
        held = self.store.on(device).held((id(self), number), self._stamp(expert))
        return None if held is None else [part for parts in held.weights for part in parts]

    def native_share(self, numbers: Collection[int], x: torch.Tensor, routing: Routing) -> torch.Tensor | None:
        """What [`share`] gives, in bfloat16, by the CPU's native kernels; `None` where they cannot compute it."""
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
            return None
        if not self.has_native_widths or routing.weights.dtype != torch.float32 or library() is None:
            return None
        asked = [number for number, count in enumerate(routing.counts) if count and number in numbers]
        self.announce(asked, x)
        with self.store.lock:
            self.known.refresh()
            held = {number: self.known.find(number) for number in asked}
        if None in held.values():
            return None
        found = torch.tensor([held[number].address if number in held else 0 for number in range(len(self))], device=x.device)
        table, parts = found[routing.chosen], []
        for some in (slice(start, start + ROWS_AT_ONCE) for start in range(0, len(x), ROWS_AT_ONCE)):
            given = (part[some].contiguous() for part in (x, routing.weights, routing.chosen, table))
            parts.append(weighted_experts(*given, FeedForward(**self.sizes, top_k=routing.chosen.shape[1])))
        self.let_go(held)
        return torch.cat(parts)

    def native(self, number: int) -> NativeExpert | None:
        """An expert for the native kernels, from the store; `None` where it has adapters or hooks, or lies elsewhere."""
        expert = self._modules[str(number)]
        tensors = weights_of(expert)
        if tensors is None:
            return None
        stamp = tuple(tensor.data_ptr() for tensor in tensors)
        held = self.store.get((id(self), number), stamp, lambda: NativeExpert(expert, tensors, **self.sizes))
        return held if held.usable else None

    def let_go(self, numbers: Iterable[int]):
        """Give back the memory of experts that were used but are not held."""
        if self.store.bounded:
            for number in numbers:
                if not self.store.keeps((id(self), number)):
                    release(self._modules[str(number)])

    def _prepare(self, expert: KimiK26MLP) -> CpuExpert:
        prepared = CpuExpert(expert)
        release(expert)  # the words have served
        return prepared


def _read_ahead(store: ExpertStore, experts: KimiK26Experts, numbers: Iterable[int]):
    for number in numbers:
        if not store.keeps((id(experts), number)):
            read_ahead(experts._modules[str(number)])


# In a compiled graph the experts are one operation on a CPU: which of them are computed is known when it runs only. It
# finds them by a number, as graphs hold tensors and numbers alone; its name has the module's, which may be loaded twice.
_numbered: WeakValueDictionary = WeakValueDictionary()


@torch.compiler.assume_constant_result
def number_of(experts: KimiK26Experts) -> int:
    """What stands for the experts of a layer in a graph."""
    _numbered[id(experts)] = experts
    return id(experts)


@torch.library.custom_op(f"{__name__.replace('.', '_')}::experts", mutates_args=())
def opaque_experts(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, number: int) -> torch.Tensor:
    """[`KimiK26Experts.forward`] without what is beside."""
    return _numbered[number](x, weights, chosen)


@opaque_experts.register_fake
def _(x, weights, chosen, number):
    return torch.empty_like(x)


class KimiK26MoE(nn.Module):
    """Routed experts plus the shared one, which every token passes through."""

    def __init__(self, config: KimiK26TextConfig):
        super().__init__()
        self.gate = KimiK26Router(config)
        self.experts = KimiK26Experts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = KimiK26MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
        # For a GPU's kernels: where the shared expert lies, and that each of few tokens has it, once.
        self._shared: tuple[ExpertTable, torch.Tensor, torch.Tensor] | None = None

    def __getstate__(self):
        return self.__dict__ | {"_shared": None}  # a copy's weights lie elsewhere

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(batch, length, hidden_size)` → the same, and the router's logits `(batch * length, experts)` float32."""
        flat = x.flatten(0, 1)
        logits, weights, chosen = self.gate(flat)
        if (shared := self.shared_by_kernels(flat)) is not None:
            table, once, first = shared
            total = self.experts(flat, weights, chosen, dtype=torch.float32)
            out = grouped_experts(flat, once[: len(flat)], first[: len(flat)], table, added=total)
        else:
            beside = partial(self.shared_experts, flat) if self.shared_experts is not None else None
            out = self.experts(flat, weights, chosen, beside)
        return out.view_as(x), logits

    def shared_by_kernels(self, x: torch.Tensor) -> tuple[ExpertTable, torch.Tensor, torch.Tensor] | None:
        """For few tokens, the shared expert as a table of one, the weight and the choice of each token; `None` where a
        GPU's kernels do not serve or there are adapters or hooks."""
        if self.shared_experts is None or torch.is_grad_enabled() or not has_kernels(x.device):
            return None
        if len(self.experts.shares) > 1:  # the shared expert does not wait for what other devices add
            return None
        if not torch.compiler.is_dynamo_compiling():  # a graph keeps to the table that it has met, if only with the many tokens before
            weights = weights_of(self.shared_experts)
            if self._shared is None or not self._shared[0].lists(0, weights):
                table = table_for(x.device, [weights])
                once = torch.ones(FEW_TOKENS, 1, dtype=torch.float32, device=x.device)
                self._shared = table and (table, once, once.long() - 1)
        if len(x) > FEW_TOKENS or self._shared is None or self._shared[0].device != x.device or not self._shared[0].serves(x):
            return None
        return self._shared
