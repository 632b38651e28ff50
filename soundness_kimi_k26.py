"""What can be wrong with a checkpoint beyond names, shapes and dtypes: its values, and the ids of its other files.

Of the expert words no value is wrong in itself, so they are read only where a scale is zero: of the published 554 GiB
some 60 are read.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import torch
from transformers.utils import logging

from .checkpoint_kimi_k26 import Checkpoint, Finding, Shard, read_json
from .configuration_kimi_k26 import KimiK26Config
from .quantization_kimi_k26 import VALUES_PER_WORD
from .vocabulary_kimi import MEDIA_PAD, SPECIAL_IDS, read_ranks


logger = logging.get_logger(__name__)

VOCABULARY, TOKENIZER_CONFIG, GENERATION_CONFIG = "tiktoken.model", "tokenizer_config.json", "generation_config.json"
CHUNK = 2**24  # bytes read at once
# Loading judges the values too where it has to read at most so many bytes for that: seconds. Larger checkpoints are
# left to `kimi-k26 check`.
VALUES_AT_LOAD = 2 * 2**30
ALL_ZERO = -0x77777778  # 0x88888888: eight stored 8s, which are the weight 0


def findings_at_load(
    checkpoint: Checkpoint, model: torch.nn.Module, dtype: Optional[torch.dtype], may_be_part: bool = False
) -> list[Finding]:
    """All that loading refuses: files, names, shapes, dtypes, ids, and the values of a checkpoint that is not large.

    Args:
        checkpoint ([`Checkpoint`]): opened.
        model (`nn.Module`): what it is to fill, on `meta`; its `config` says which ids there are.
        dtype (`torch.dtype`, *optional*): of the plain weights in the files, by their config.
        may_be_part (`bool`): the model need not have a place for every tensor.
    """
    findings = checkpoint.findings + list(checkpoint.compare(model, dtype, may_be_part))
    findings += check_ids(checkpoint.folder, model.config, may_grow=True)
    if sum(entry.end - entry.begin for _, _, entry in _to_read(checkpoint)) <= VALUES_AT_LOAD:
        findings += check_values(checkpoint, findings)
    return findings


def is_hollow(shard: Shard) -> bool:
    """Whether no data was ever written to the file: sparse behind its header, as a stand-in of full size is."""
    try:
        with open(shard.path, "rb") as file:
            block = max(os.fstat(file.fileno()).st_blksize, 2**16)
            behind_header = -(-shard.data_begin // block) * block  # the header's last block holds data as well
            if behind_header >= shard.size:
                return False
            os.lseek(file.fileno(), behind_header, os.SEEK_DATA)
    except (AttributeError, OSError) as error:  # a system that does not know; ENXIO: nothing from there on
        return isinstance(error, OSError) and error.errno == 6
    return False


def _to_read(checkpoint: Checkpoint) -> list[tuple[Shard, str, object]]:
    """The tensors whose values can be wrong, in the order of the files."""
    found = []
    for shard in checkpoint.shards:
        if shard.in_place:
            rows = sorted(shard.entries.items(), key=lambda item: item[1].begin)
            judged = ((n, e) for n, e in rows if e.dtype.is_floating_point or n.endswith(".weight_shape"))
            found += [(shard, name, entry) for name, entry in judged if checkpoint.where[name] is shard]
    return found


def check_values(checkpoint: Checkpoint, known: list[Finding] = (), progress=iter) -> Iterator[Finding]:
    """Judge scales, recorded shapes and plain weights, at most `CHUNK` bytes or one projection at a time.

    A checkpoint of which no shard holds any data (sparse files of full size, for a trial) has no values to judge.

    Args:
        checkpoint ([`Checkpoint`]): opened; shards in which tensors are out of place are passed over.
        known (`list[Finding]`): what was found before; these tensors are passed over.
        progress (*optional*): wraps the list of what is to be read.
    """
    hollow = [shard for shard in checkpoint.shards if shard.in_place and is_hollow(shard)]
    if hollow and len(hollow) == len(checkpoint.shards):
        return
    for shard in hollow:
        size = shard.size - shard.data_begin
        yield Finding(shard.name, None, f"holds no data: its {size} bytes were never written, as in a broken download")
    known = {finding.tensor for finding in known}
    for shard, name, entry in progress(_to_read(checkpoint)):
        if shard in hollow or name in known:
            continue
        stem, _, kind = name.rpartition(".")
        words = f"{stem}.weight_packed"
        judge = {"weight_shape": _wrong_shape, "weight_scale": _wrong_scales}.get(kind)
        if judge is None:
            problem = _not_finite(shard, name, entry)
        elif words in checkpoint.where and checkpoint.where[words].in_place and words not in known:
            problem = judge(shard.read(name), checkpoint.where[words], words)
        else:
            continue
        if problem is not None:
            yield Finding(shard.name, name, problem)


def _not_finite(shard: Shard, name: str, entry) -> Optional[str]:
    done = 0
    for raw in shard.bytes_of(name, CHUNK):
        values = torch.frombuffer(raw, dtype=entry.dtype)
        if not values.isfinite().all():
            return _where(~values.isfinite(), values, entry.shape, done)
        done += len(values)
    return None


def _where(wrong: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...], before: int = 0) -> str:
    """The first of the wrong values, flat, and its place in the tensor."""
    first = int(wrong.nonzero()[0])
    place, at = [], before + first
    for side in reversed(shape):
        place.insert(0, at % side)
        at //= side
    return f"holds {values[first].item()} at {place}"


def _wrong_shape(shape: torch.Tensor, shard: Shard, words: str) -> Optional[str]:
    rows, columns = shard.entries[words].shape
    wanted = [rows, columns * VALUES_PER_WORD]
    return None if shape.tolist() == wanted else f"says {shape.tolist()}, but the words are those of a weight {wanted}"


def _wrong_scales(scales: torch.Tensor, shard: Shard, words: str) -> Optional[str]:
    flat, shape = scales.flatten(), tuple(scales.shape)
    for wrong in (~flat.isfinite(), flat < 0):
        if wrong.any():
            return _where(wrong, flat, shape)
    rows, columns = shard.entries[words].shape
    if not (scales == 0).any() or len(shape) != 2 or shape[0] != rows or columns % shape[1]:
        return None
    groups = shard.read(words).unflatten(-1, (shape[1], -1))  # (outputs, groups, words of a group)
    nothing = (groups == 0).all(-1) | (groups == ALL_ZERO).all(-1)
    wrong = ((scales == 0) & ~nothing).flatten()
    return _where(wrong, flat, shape) + ", where the words are not zero" if wrong.any() else None


def check_ids(folder: Path, config: KimiK26Config, may_grow: bool = False) -> list[Finding]:
    """Ids of the tokenizer's and the generation files that the model's vocabulary does not have, or means otherwise.

    Files that are absent are passed over, and a tokenizer that is malformed itself: loading it says what is wrong. `may_grow`: a token
    that a user added to the tokenizer is no damage, as the model can be resized when it is loaded; a warning says so.
    """
    folder, size, findings = Path(folder), config.text_config.vocab_size, []

    def beyond(file, key, index):
        if isinstance(index, int) and not 0 <= index < size:
            findings.append(Finding(file, key, f"is the id {index}, outside text_config.vocab_size ({size})"))

    ranks = None
    try:
        ranks = len(read_ranks(folder / VOCABULARY))
        if ranks + SPECIAL_IDS > size:
            has = f"has {ranks} tokens and {SPECIAL_IDS} special ids behind them"
            findings.append(Finding(VOCABULARY, None, f"{has}, but text_config.vocab_size is {size}"))
    except (OSError, ValueError):
        pass
    try:
        added = added_tokens(read_json((folder / TOKENIZER_CONFIG).read_bytes()))
    except (OSError, ValueError):
        added = {}
    if ranks is not None and added:
        if min(added) > ranks:
            problem = f"begins at the id {min(added)}, but the special ids begin behind the {ranks} tokens of {VOCABULARY}"
            findings.append(Finding(TOKENIZER_CONFIG, "added_tokens_decoder", problem))
        for index in sorted(index for index in added if index < ranks):
            problem = f"has the id {index}, which is a byte pair's of {VOCABULARY}"
            findings.append(Finding(TOKENIZER_CONFIG, added[index], problem))
    for index, content in added.items():
        if may_grow and ranks is not None and index >= max(size, ranks + SPECIAL_IDS):
            logger.warning(f"the tokenizer has {content!r} (id {index}), the model has {size} embeddings: call resize_token_embeddings(len(tokenizer))")
        else:
            beyond(TOKENIZER_CONFIG, content, index)
    pads = [index for index, content in added.items() if content == MEDIA_PAD]
    if pads and config.media_placeholder_token_id not in pads:
        problem = f"is {config.media_placeholder_token_id}, but {MEDIA_PAD} has the id {pads[0]} in {TOKENIZER_CONFIG}"
        findings.append(Finding("config.json", "media_placeholder_token_id", problem))
    if (folder / GENERATION_CONFIG).is_file():
        try:
            generation = read_json((folder / GENERATION_CONFIG).read_bytes())
        except ValueError as error:
            return [*findings, Finding(GENERATION_CONFIG, None, str(error))]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            value = generation.get(key)
            for index in value if isinstance(value, list) else [value]:
                beyond(GENERATION_CONFIG, key, index)
    return findings


def added_tokens(tokenizer_config: dict) -> dict[int, str]:
    """Id → text of `added_tokens_decoder`.

    Raises:
        ValueError: it is malformed; names the entry.
    """
    added = {}
    entries = tokenizer_config.get("added_tokens_decoder")
    if not isinstance(entries, dict):
        raise ValueError("must have added_tokens_decoder, an object of id → token")
    for index, token in entries.items():
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(index, str) or not index.isdecimal() or not isinstance(content, str) or not content:
            raise ValueError(f"added_tokens_decoder has {index!r}: {token!r}; it must be an id and a token with content")
        added[int(index)] = content
    return added
