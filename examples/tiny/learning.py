"""What training adds to the model: stacked experts, pictures in groups of one size, the optimizer, the balance."""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from kimi_k26 import KimiK26ForConditionalGeneration
from kimi_k26.attention_kimi_k26 import rotate_pairs
from kimi_k26.decoding_kimi_k26 import HAS_FAST_PRODUCTS
from kimi_k26.experts_kimi_k26 import KimiK26Experts
from kimi_k26.quantization_kimi_k26 import dequantize_int4, quantize_int4
from kimi_k26.vision_kimi_k26 import rotary_2d

from .batches import IGNORED, SIGHTS, Batch, shared_out

INT4_GROUP = 32
BLOCK = 64  # rows: products are padded to whole blocks
QUERY_BLOCK = 160  # queries whose scores are held at once


def whole_blocks(count: int) -> int:
    return -(-count // BLOCK) * BLOCK


class CausalAttention(torch.autograd.Function):
    """Causal attention with its gradient written out, `(batch * heads, length, dim)` each.

    Scores are at least float32, probabilities of the queries' dtype, and no query meets keys of later blocks: on a CPU this takes little more
    than half the time of PyTorch's fused attention in float32, which in bfloat16 is slower still.
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling):
        ctx.save_for_backward(query, key, value)
        ctx.scaling, ctx.blocks, outs = scaling, [], []
        dtype = torch.promote_types(query.dtype, torch.float32)
        for rows, keys in query_blocks(query.shape[1]):
            block, turned = query[:, rows].to(dtype), key[:, :keys].to(dtype).transpose(1, 2)
            unseen = block.new_full((block.shape[1], keys), -torch.inf).triu_(rows.start + 1)
            scores = torch.baddbmm(unseen.expand(len(query), -1, -1), block, turned, alpha=scaling)
            ctx.blocks.append(scores.softmax(-1).to(query.dtype))
            outs.append(ctx.blocks[-1] @ value[:, :keys])
        return torch.cat(outs, dim=1)

    @staticmethod
    def backward(ctx, gradient):
        query, key, value = ctx.saved_tensors
        for_query, for_key, for_value = (torch.zeros_like(part) for part in (query, key, value))
        for (rows, keys), weights in zip(query_blocks(query.shape[1]), ctx.blocks):
            given = gradient[:, rows].contiguous()
            for_value[:, :keys] += weights.transpose(1, 2) @ given
            scores = given @ value[:, :keys].transpose(1, 2)
            scores = torch._softmax_backward_data(scores, weights, -1, scores.dtype).mul_(ctx.scaling)
            for_query[:, rows] = scores @ key[:, :keys]
            for_key[:, :keys] += scores.transpose(1, 2) @ query[:, rows]
        return for_query, for_key, for_value, None


def query_blocks(length: int) -> list[tuple[slice, int]]:
    """Rows of queries, and how many keys they can see."""
    ends = [min(start + QUERY_BLOCK, length) for start in range(0, length, QUERY_BLOCK)]
    return [(slice(start, end), end) for start, end in zip([0, *ends], ends)]


def causal_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """The attention that text is trained with, as the library calls such functions; padding stands on the right."""
    value = value[..., : module.v_dim]  # the rest makes values as wide as keys
    out = CausalAttention.apply(*(part.flatten(0, 1) for part in (query, key, value)), scaling)
    return out.unflatten(0, query.shape[:2]).transpose(1, 2), None


class StackedExperts(nn.Module):
    """The routed experts of one layer with their weights stacked, which trains several times faster than many modules.

    `weigh` copies them into the published modules, `read` takes them from there; the sums are the same.
    """

    def __init__(self, config):
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate = nn.Parameter(torch.empty(experts, width, hidden))
        self.up = nn.Parameter(torch.empty(experts, width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        self.real: torch.Tensor | None = None  # (tokens,) boolean: padding passes no expert
        self.load = torch.zeros(experts)  # tokens each expert got since it was last read

    def forward(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, beside=None) -> torch.Tensor:
        experts, (tokens, top_k) = len(self.gate), chosen.shape
        flat = chosen.flatten()
        if self.real is not None:
            flat = torch.where(self.real.repeat_interleave(top_k), flat, experts)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=experts + 1)
        self.load += counts[:experts]
        # Every expert has as many places as the busiest one needs, in whole blocks; what is free reads a row of zeros.
        width = whole_blocks(int(counts[:experts].max()))
        begin = counts.cumsum(0) - counts
        places = torch.empty_like(flat)  # of each (token, choice); padding has none
        places[order] = torch.arange(len(flat)) - begin[flat[order]] + flat[order] * width
        places = places.clamp(max=experts * width)
        source = torch.full((experts * width + 1,), tokens)
        source[places] = torch.arange(len(flat)) // top_k
        given = F.pad(x, (0, 0, 0, 1)).index_select(0, source[:-1]).view(experts, width, -1)
        # The weights of the sum are put on what is narrower, what goes into the last product.
        placed = torch.zeros(experts * width + 1).index_put((places,), weights.flatten().float())[:-1]
        inner = F.silu(given @ self.gate.transpose(1, 2)) * (given @ self.up.transpose(1, 2))
        inner = inner * placed.to(x.dtype).view(experts, width, 1)
        out = F.pad((inner @ self.down.transpose(1, 2)).flatten(0, 1), (0, 0, 0, 1))
        out = out.index_select(0, places).view(tokens, top_k, -1).sum(1)
        return out if beside is None else out + beside()

    @torch.no_grad()
    def read(self, experts: KimiK26Experts) -> None:
        """Take the weights of the model's own experts, as what their INT4 words stand for where they are packed."""
        for at, expert in enumerate(experts):
            for name in ("gate", "up", "down"):
                linear = getattr(expert, f"{name}_proj")
                weight = linear.dequantize(torch.bfloat16) if hasattr(linear, "set_weight") else linear.weight
                getattr(self, name)[at].copy_(weight)

    @torch.no_grad()
    def weigh(self, experts: KimiK26Experts) -> None:
        """Write the weights into the model's own experts, INT4 or plain."""
        for at, expert in enumerate(experts):
            for name in ("gate", "up", "down"):
                linear, weight = getattr(expert, f"{name}_proj"), getattr(self, name)[at]
                if hasattr(linear, "set_weight"):
                    linear.set_weight(weight.to(torch.bfloat16))
                else:
                    linear.weight.copy_(weight)


def moe_layers(model) -> list[nn.Module]:
    return [layer.mlp for layer in model.language_model.model.layers if hasattr(layer.mlp, "experts")]


@torch.no_grad()
def start_weights(model) -> None:
    """First weights: each matrix keeps the size of what it is given; the last one of each branch starts small."""
    for name, parameter in model.named_parameters():
        if "bias" in name:
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        elif "embed_tokens" in name:
            parameter.normal_(0, 0.5)
        elif "pos_emb" in name:
            parameter.normal_(0, 0.3)
        elif parameter.dim() >= 2:
            fan_in = parameter[0].numel() if "experts.gate" not in name else parameter.shape[-1]
            if ".experts." in name:
                fan_in = parameter.shape[-1]
            small = 0.3 if any(part in name for part in ("o_proj", "down", "wo.", "fc1", "lm_head", "q_b_proj")) else 1.0
            parameter.normal_(0, small / math.sqrt(fan_in))


def media_features(model, batch: Batch) -> torch.Tensor:
    """What `model.get_image_features` gives, computed for all clips of one size at once: `(media tokens, hidden)`."""
    tower = model.vision_tower
    embed, config = tower.patch_embed, tower.config
    dtype = embed.proj.weight.dtype
    grids = list(batch.clips)
    pixels = torch.cat([pixels.flatten(0, 1) for pixels, _ in batch.clips.values()])
    filling = whole_blocks(len(pixels)) - len(pixels)
    pixels = F.pad((pixels.float() / 127.5 - 1).to(dtype), (0, 0, 0, filling))
    x = F.linear(pixels, embed.proj.weight.flatten(1), embed.proj.bias)
    counts = [len(batch.clips[grid][1]) for grid in grids]
    codes = [embed.pos_emb(grid).repeat(count, 1) for grid, count in zip(grids, counts)]
    x = x + F.pad(torch.cat(codes), (0, 0, 0, filling))
    turns = [rotary_2d([grid], tower.encoder.head_dim, x.device) for grid in grids]
    cos = torch.cat([turn[0].repeat(count, 1) for turn, count in zip(turns, counts)]).unsqueeze(1)
    sin = torch.cat([turn[1].repeat(count, 1) for turn, count in zip(turns, counts)]).unsqueeze(1)
    areas = [frames * rows * columns for frames, rows, columns in grids]
    lengths = [area * count for area, count in zip(areas, counts)]
    total = sum(lengths)
    for block in tower.encoder.blocks:
        query, key, value = block.wqkv(block.norm0(x))[:total].float().unflatten(-1, (3, block.heads, -1)).unbind(1)
        query, key = rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin)
        outs = []
        for *qkv, area in zip(query.split(lengths), key.split(lengths), value.split(lengths), areas):
            qkv = [part.unflatten(0, (-1, area)).transpose(1, 2) for part in qkv]
            out = F.scaled_dot_product_attention(*qkv, scale=block.scaling)
            outs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
        x = x + block.wo(F.pad(torch.cat(outs).to(x.dtype), (0, 0, 0, filling)))
        x = x + block.mlp(block.norm1(x))
    x = tower.encoder.final_layernorm(x[:total])
    row_step, column_step = config.merge_kernel_size
    merged, places = [], []
    for part, (frames, rows, columns), grid in zip(x.split(lengths), grids, grids):
        part = part.unflatten(0, (-1, frames, rows // row_step, row_step, columns // column_step, column_step))
        part = part.mean(1).transpose(2, 3)  # (clips, rows / 2, columns / 2, 2, 2, width)
        merged.append(part.flatten(3, 4).flatten(0, 2))
        tokens = (rows // row_step) * (columns // column_step)
        places += [start + k for start in batch.clips[grid][1] for k in range(tokens)]
    merged = torch.cat(merged)
    features = model.mm_projector(F.pad(merged, (0, 0, 0, 0, 0, whole_blocks(len(merged)) - len(merged))))
    return features[torch.tensor(places).argsort()]


def add_sight(model) -> None:
    """A layer that training alone has: it reads off each media token what stands there (`batches.SIGHTS`)."""
    model.sight = nn.Linear(model.config.text_config.hidden_size, sum(SIGHTS))


def sight_loss(model, features: torch.Tensor, sights: torch.Tensor) -> torch.Tensor:
    """Cross entropy of what each media token shows: it tells every part of a picture, not only the answer, what to be."""
    loss = 0.0
    for logits, classes in zip(model.sight(features).float().split(SIGHTS, dim=-1), sights.unbind(-1)):
        if bool((classes >= 0).any()):
            loss = loss + F.cross_entropy(logits, classes, ignore_index=IGNORED)
    return loss


def forward(model, batch: Batch, media_token: int, pad_token: int, want_router: bool = False):
    """Logits of the assistant's words `(words, vocabulary)`, their labels, their rows, the router's logits, and the
    loss of `sight_loss`, 0 without media."""
    core = model.language_model.model
    embeds, seen = core.embed_tokens(batch.ids), torch.zeros(())
    if batch.clips:
        where, features = (batch.ids == media_token).unsqueeze(-1), media_features(model, batch)
        embeds = embeds.masked_scatter(where, features)
        seen = sight_loss(model, features, batch.sights)
    real = (batch.ids != pad_token).flatten()
    for layer in moe_layers(model):
        layer.experts.real = real
    # Padding stands on the right and nothing is learnt from it, so the causal mask is all that is needed.
    output = core(embeds, output_router_logits=want_router)
    wanted = batch.labels != IGNORED
    heard = output.last_hidden_state[wanted]
    heard = F.pad(heard, (0, 0, 0, whole_blocks(len(heard)) - len(heard)))
    logits = model.language_model.lm_head(heard)[: int(wanted.sum())]
    rows = wanted.nonzero()[:, 0]
    routers = [logits[real] for logits in output.router_logits] if want_router else []
    return logits.float(), batch.labels[wanted], rows, routers, seen


def balance_loss(routers: list[torch.Tensor], top_k: int) -> torch.Tensor:
    """The load-balancing loss of DeepSeek-V3 (arXiv:2412.19437, equations 17 to 20), over a batch, mean over layers."""
    total = 0.0
    for logits in routers:
        scores = logits.sigmoid()
        chosen = scores.topk(top_k, dim=-1).indices
        share = torch.bincount(chosen.flatten(), minlength=logits.shape[1]).float() / (len(logits) * top_k)
        mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
        total = total + logits.shape[1] * (share * mean).sum()
    return total / len(routers)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix whose singular values are about 1, by five Newton-Schulz steps (Muon, Jordan et al. 2024).

    `(..., rows, columns)` → the same, bfloat16. Where the processor has no products of bfloat16, float32 is many times faster.
    """
    x = matrix.to(torch.bfloat16 if HAS_FAST_PRODUCTS else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.transpose(-1, -2) if tall else x
    x = x / (x.float().flatten(-2).norm(dim=-1)[..., None, None] + 1e-7).to(x.dtype)
    for _ in range(5):
        a = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.transpose(-1, -2) if tall else x).to(torch.bfloat16)


@torch.no_grad()
def take_weights(model, checkpoint: KimiK26ForConditionalGeneration) -> None:
    """A checkpoint's weights into a model as it is trained; what only training has stays as it is."""
    theirs = dict(checkpoint.named_parameters())
    for name, parameter in model.named_parameters():
        if name in theirs:
            parameter.copy_(theirs[name])
    for mine, other in zip(moe_layers(model), moe_layers(checkpoint)):
        mine.experts.read(other.experts)


class Optimizer:
    """Muon for the matrices inside the layers, Adam for all else; float32 masters of bfloat16 weights.

    From the moment `int4` is set, the routed experts' bfloat16 weights are those that their INT4 words stand for, while
    gradients go to the masters unrounded (a straight-through estimate): the model learns with the weights it will have.
    """

    def __init__(self, model, matrix_rate: float, other_rate: float, decay: float):
        self.matrix_rate, self.decay = matrix_rate, decay
        self.int4, self.steps = False, 0
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.master = {name: p.detach().float().clone() for name, p in self.live.items()}
        self.moment = {name: torch.zeros_like(p) for name, p in self.master.items()}
        self.matrices: dict[tuple, list[str]] = {}
        for name, p in self.live.items():
            inside = any(part in name for part in (".layers.", ".blocks.", "mm_projector", "patch_embed.proj"))
            if inside and p.dim() >= 2 and "mlp.gate.weight" not in name:
                shape = (len(p), p[0].numel()) if "patch_embed" in name else tuple(p.shape[-2:])
                self.matrices.setdefault(shape, []).append(name)
        by_muon = {name for names in self.matrices.values() for name in names}
        self.others = [name for name in self.live if name not in by_muon]
        # Adam moves every element alike, so a layer that adds up many inputs must move each of them less.
        calm = ("mlp.gate.weight", "lm_head", "sight")
        self.rates = {name: other_rate * (0.25 if any(part in name for part in calm) else 1.0) for name in self.others}
        self.second = {name: torch.zeros_like(self.master[name]) for name in self.others}

    @torch.no_grad()
    def step(self, gradients: dict[str, torch.Tensor], factor: float, rank: int = 0, world: int = 1) -> None:
        """One step along `gradients` (float32), rates times `factor`. What has no gradient stays as it is.

        With several processes, which call it with the same gradients, each works out the directions of its share of the
        matrices.
        """
        self.steps += 1
        rate = self.matrix_rate * factor
        for name, direction in self.directions(gradients, rank, world).items():
            master = self.master[name]
            master.mul_(1 - rate * self.decay)
            master.sub_(direction.view_as(master), alpha=rate * max(1, direction.shape[1] / direction.shape[2]) ** 0.5)
        first, second = 0.9, 0.98
        for name in self.others:
            if name not in gradients:
                continue
            rate = self.rates[name] * factor
            gradient = gradients[name]
            moment, square = self.moment[name].lerp_(gradient, 1 - first), self.second[name]
            square.lerp_(gradient.square(), 1 - second)
            scale = (square / (1 - second**self.steps)).sqrt_().add_(1e-8)
            self.master[name].sub_(moment / scale, alpha=rate / (1 - first**self.steps))
        self.publish()

    def directions(self, gradients: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, torch.Tensor]:
        """Muon's, of each name `(matrices, rows, columns)` float32."""
        groups = []
        for (rows, columns), names in self.matrices.items():
            wide = {}
            for name in (name for name in names if name in gradients):
                moment = self.moment[name].lerp_(gradients[name], 0.05)
                wide[name] = gradients[name].lerp(moment, 0.95).reshape(-1, rows, columns)
            if wide:
                matrices = torch.cat(list(wide.values()))
                groups.append((wide, matrices))
        owners = shared_out([matrices.numel() * min(matrices.shape[1:]) for _, matrices in groups], world)
        parts = [
            orthogonal(matrices) if owner == rank else torch.zeros_like(matrices, dtype=torch.bfloat16)
            for (_, matrices), owner in zip(groups, owners)
        ]
        flat = torch.cat([part.flatten() for part in parts])
        if world > 1:
            dist.all_reduce(flat)
        found = {}
        for (wide, matrices), part in zip(groups, flat.float().split([part.numel() for part in parts])):
            found |= zip(wide, part.view_as(matrices).split([len(one) for one in wide.values()]))
        return found

    @torch.no_grad()
    def publish(self) -> None:
        """Masters → the model's own weights."""
        for name, p in self.live.items():
            master = self.master[name]
            if self.int4 and ".experts." in name:
                master = dequantize_int4(*quantize_int4(master.to(torch.bfloat16), INT4_GROUP), torch.bfloat16)
            p.copy_(master)

    def state(self) -> dict:
        kept = ("int4", "steps", "master", "moment", "second")
        return {name: getattr(self, name) for name in kept}

    def restore(self, state: dict) -> None:
        self.int4, self.steps = state["int4"], state["steps"]
        for mine, theirs in ((getattr(self, n), state[n]) for n in ("master", "moment", "second")):
            for name, tensor in mine.items():
                if name in theirs:
                    tensor.copy_(theirs[name])
        self.publish()
