"""One model over several processes: what is split, and what the processes tell each other.

With `torchrun` and `from_pretrained(…, tp_plan="auto")` the library starts the group of processes, reads of each split
weight the part of its process alone, and exchanges what linear layers need. What it has no way for is here: attention
whose heads are split while its latents are not, and experts that stay whole, each in one process.
"""


import torch
from torch import distributed
from transformers.distributed import DistributedConfig
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer


BY_OUTPUT, BY_INPUT, GATHERED = "colwise", "rowwise", "colwise_rep"  # the library's names; the last gives all its outputs
OWN = "kimi_k26"  # modules that split themselves
OF_EXPERTS = r"\.mlp\.experts\.\d+\."  # names of their tensors


class Peers:
    """The processes that share a model.

    Attributes:
        size, rank (`int`): how many there are, and which one this is.
    """

    def __init__(self, mesh):
        self.group, self.size, self.rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()

    def __deepcopy__(self, memo):
        return self  # a copy of the model is shared by the same processes

    def mine(self, count: int) -> range:
        """Which of `count` things this process has: as many as the others, or one more."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def owner(self, number: int, count: int) -> int:
        """The process that has one of `count` things."""
        return ((number + 1) * self.size - 1) // count

    def sum(self, x: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' `x`, in each of them. `sources` are what `sum_gradients` gave for it: a process whose part is
        made of none of them still takes part in adding up their gradients."""
        return _Sum.apply(self.group, x, *sources)

    def sum_gradients(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors, which all processes have alike, and each uses for a part of the result: gradients are added up."""
        if not torch.is_grad_enabled():
            return tensors
        return _SumGradients.apply(self.group, *tensors)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, x, *sources):
        ctx.sources = len(sources)
        x = x.contiguous().clone()
        distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return None, grad, *[None] * ctx.sources


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, *tensors):
        ctx.group = group
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *grads):  # zeros where there is none
        grads = [grad.contiguous().clone() for grad in grads]
        for grad in grads:
            distributed.all_reduce(grad, group=ctx.group)
        return None, *grads


class _SplitsItself(TensorParallelLayer):
    """The library's style for modules with a method `split`; it gives them their [`Peers`] before weights are read."""

    def prepare_module_tp(self, module, device_mesh):  # what transformers 4 calls
        module.split(Peers(device_mesh))
        return module

    def install_forward(self, module, mesh):  # what transformers 5 calls
        module.split(Peers(mesh))
        return module


def split_plan(config) -> dict[str, str]:
    """Module → the library's name for how it is split; `*` stands for any number.

    Args:
        config (`KimiK26Config`).
    """
    ALL_PARALLEL_STYLES.register(OWN, _SplitsItself())
    text, layer = config.text_config, "language_model.model.layers.*"
    has_experts = [text.is_moe_layer(index) for index in range(text.num_hidden_layers)]
    query = "q_proj" if text.q_lora_rank is None else "q_b_proj"
    plan = {f"{layer}.self_attn": OWN, f"{layer}.self_attn.o_proj": BY_INPUT}
    plan |= {f"{layer}.self_attn.{name}": BY_OUTPUT for name in (query, "kv_b_proj")}
    networks = [f"{layer}.mlp"] if not all(has_experts) else []
    if any(has_experts):
        plan[f"{layer}.mlp.experts"] = OWN
        networks += [f"{layer}.mlp.shared_experts"] if text.n_shared_experts else []
    for network in networks:
        plan |= {f"{network}.gate_proj": BY_OUTPUT, f"{network}.up_proj": BY_OUTPUT, f"{network}.down_proj": BY_INPUT}
    return plan | {"language_model.lm_head": GATHERED}


def check_split(text_config, size: int):
    """See that all widths can be shared evenly.

    Raises:
        ValueError: where a width cannot be shared by `size` processes, naming it.
    """
    shared = text_config.n_shared_experts
    widths = {
        "num_attention_heads": text_config.num_attention_heads,
        "intermediate_size": text_config.intermediate_size,
        "vocab_size": text_config.vocab_size,
        "moe_intermediate_size times n_shared_experts": shared and text_config.moe_intermediate_size * shared,
    }
    for name, width in widths.items():
        if width and width % size:
            raise ValueError(f"{name} ({width}) cannot be shared by {size} processes: it is no multiple of {size}")
    if 0 < (text_config.n_routed_experts or 0) < size:
        raise ValueError(f"n_routed_experts ({text_config.n_routed_experts}) cannot be shared by {size} processes: some would have none")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a weight."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def as_the_library_takes_it(arguments: dict) -> dict:
    """Arguments of `from_pretrained` in which `tp_plan` and `tp_size` are given as the library's version wants them."""
    given = {name: arguments[name] for name in ("tp_plan", "tp_size") if arguments.get(name) is not None}
    others = {name: value for name, value in arguments.items() if name not in ("tp_plan", "tp_size")}
    if not given or arguments.get("distributed_config") is not None:
        return arguments
    if "tp_plan" not in DistributedConfig.__dataclass_fields__:  # transformers 4
        return arguments
    return others | {"distributed_config": DistributedConfig(**given)}


def gather(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights of a split model, in the main memory of the first process; of the others, what is not split.

    Every process must call this.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor
    for name, module in model.named_modules():
        peers = getattr(module, "peers", None)
        if isinstance(module, torch.nn.ModuleList) and peers is not None:
            like = module[peers.mine(len(module))[0]].state_dict()
            for number in range(len(module)):
                for key, tensor in like.items():
                    _send_to_first(state, f"{name}.{number}.{key}", tensor, peers, peers.owner(number, len(module)))
    return state


def _send_to_first(state: dict[str, torch.Tensor], name: str, like: torch.Tensor, peers: Peers, owner: int):
    first, source = (distributed.get_global_rank(peers.group, rank) for rank in (0, owner))
    if owner == 0:
        return
    if peers.rank == owner:
        distributed.send(state[name].contiguous(), first, group=peers.group)
    elif peers.rank == 0:
        received = torch.empty_like(like)
        distributed.recv(received, source, group=peers.group)
        state[name] = received.cpu()
