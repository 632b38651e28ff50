"""How `from_pretrained` brings a folder's weights into a model: mapped, judged before, dealt to accelerators.

What it cannot do so goes through the library's own loader, after the same judgement.
"""

import copy
import ctypes
import os
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Optional

import torch
from accelerate.utils import convert_file_size_to_int
from torch import nn
from transformers import PretrainedConfig
from transformers.generation import GenerationConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

from .checkpoint_kimi_k26 import INDEX_FILE, SINGLE_FILE, Checkpoint, CheckpointError
from .configuration_kimi_k26 import KimiK26Config
from .placement_kimi_k26 import OFFLOADED, STRATEGIES, Placement, Sizes, as_device, is_of_experts, memory, plan
from .soundness_kimi_k26 import findings_at_load


try:
    from transformers.initialization import no_init_weights
except ImportError:  # transformers 4
    from transformers.modeling_utils import no_init_weights

logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that say where the Hub has the files, and where they go to.
OF_THE_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")
# Those that change nothing about a folder whose weights are mapped into main memory.
SAYS_NOTHING_HERE = {
    *("trust_remote_code", "code_revision", "subfolder", *OF_THE_HUB),
    *("low_cpu_mem_usage", "use_safetensors", "weights_only", "offload_folder", "offload_state_dict", "offload_buffers"),
    *("adapter_kwargs", "_from_auto", "_from_pipeline", "_commit_hash"),
}


def find_folder(name, kwargs: dict) -> Optional[Path]:
    """The folder that `from_pretrained` is asked for: one that is there, or that of a repository in the Hub's cache, which its files
    are downloaded to first. `None` for none with safetensors files, or without a config."""
    subfolder = kwargs.get("subfolder") or ""
    if name is None or os.path.isdir(name):
        return None if name is None else Path(name, subfolder)
    if kwargs.get("use_safetensors") is False or kwargs.get("variant") or kwargs.get("gguf_file") or kwargs.get("state_dict"):
        return None
    where = {key: kwargs[key] for key in OF_THE_HUB if kwargs.get(key) is not None} | {"subfolder": subfolder}
    try:
        found = {file: cached_file(name, file, _raise_exceptions_for_missing_entries=False, **where) for file in (CONFIG_NAME, GENERATION_CONFIG_NAME, INDEX_FILE)}
        weights = found[INDEX_FILE] or cached_file(name, SINGLE_FILE, _raise_exceptions_for_missing_entries=False, **where)
        if weights is None or found[CONFIG_NAME] is None:
            return None
        if found[INDEX_FILE]:
            get_checkpoint_shard_files(name, found[INDEX_FILE], **where)
    except OSError:  # what the library says of it, too
        return None
    return Path(weights).parent


def maps_into_memory(folder: Optional[Path], model_args, kwargs) -> bool:
    """Whether a call of `from_pretrained` asks for no more than a folder's safetensors files in main memory, or dealt
    to accelerators from there."""
    known = {"config", "dtype", "device_map", "output_loading_info", "attn_implementation", "max_memory"}
    known |= SAYS_NOTHING_HERE
    on_cpu = [None, "cpu", torch.device("cpu"), {"": "cpu"}, {"": torch.device("cpu")}]
    device_map, max_memory = kwargs.get("device_map"), kwargs.get("max_memory")
    if not torch.accelerator.is_available() or max_memory is not None and set(max_memory) <= set(OFFLOADED):
        on_cpu += STRATEGIES
    in_memory = device_map in on_cpu or _spreads(device_map, max_memory)
    return (
        not model_args
        and set(kwargs) <= known
        and in_memory
        and torch.get_default_device().type == "cpu"
        and folder is not None
        and kwargs.get("use_safetensors") is not False
        and set(kwargs.get("adapter_kwargs") or ()) <= {"token", "revision"}  # of an adapter's files, which are not there
        and not (folder / "adapter_config.json").exists()
        and any((folder / name).exists() for name in (INDEX_FILE, SINGLE_FILE))
        and not is_deepspeed_zero3_enabled()
    )


def load_mapped(cls, folder: Path, name, expert_budget, kwargs: dict):
    """What `cls.from_pretrained` gives where [`maps_into_memory`] says yes: the model, or also the library's report.

    Args:
        cls: the class of the model.
        folder (`Path`): the checkpoint.
        name (`str` or `os.PathLike`): what the caller calls it.
        expert_budget (`int` or `str`, *optional*), kwargs (`dict`): of `from_pretrained`.

    Raises:
        CheckpointError: listing all that is damaged or does not fit the config.
    """
    dtype, device_map = kwargs.pop("dtype"), kwargs.pop("device_map", None)
    max_memory = kwargs.pop("max_memory", None)
    loading_info = kwargs.pop("output_loading_info", False)
    for key in SAYS_NOTHING_HERE:
        kwargs.pop(key, None)
    attention = kwargs.pop("attn_implementation", None)
    config = kwargs.pop("config", None)
    if not isinstance(config, PretrainedConfig):
        source = folder if config is None else config
        config, kwargs = KimiK26Config.from_pretrained(source, return_unused_kwargs=True, **kwargs)
    config = copy.deepcopy(config)
    config.name_or_path = str(name)
    if attention is not None:
        config._attn_implementation = attention
    checkpoint, own = Checkpoint(folder), _own_config(folder)
    for part in (config, config.text_config):
        if dtype != "auto":
            part.dtype = _dtype_called(dtype) if isinstance(dtype, str) else dtype
    with built_on_meta(config.dtype or torch.float32):
        model = cls(config, **kwargs)
    is_part = _is_part(config, own)
    findings = findings_at_load(checkpoint, model, _stored_dtype(own), is_part)
    if findings:
        raise CheckpointError(folder, findings)
    left_out = checkpoint.beyond(model) if is_part else []
    if left_out:
        logger.warning(f"{folder} has {len(left_out):,} tensors that the given config leaves out, such as {left_out[0]}")
    progress = partial(logging.tqdm, desc="Loading weights", unit=" modules")
    if _spreads(device_map, max_memory):
        placement = _placement(model, device_map, max_memory, expert_budget)
        checkpoint.fill(model, progress, placement.device_of)
        placement.carry_out(model, partial(logging.tqdm, desc="Sending experts", unit=" experts"))
    else:
        checkpoint.fill(model, progress)
        model.set_budget((max_memory or {}).get("cpu"), expert_budget)
        if device_map is not None:
            model.hf_device_map = {"": "cpu"}
    model.eval()
    if (Path(folder) / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    _trim_heap()
    report = {"missing_keys": [], "unexpected_keys": left_out, "mismatched_keys": [], "error_msgs": []}
    return (model, report) if loading_info else model


def _dtype_called(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be 'auto' or the name of one of PyTorch's, such as 'bfloat16', not {name!r}")
    return dtype


def _trim_heap():
    """Give what was freed while loading back to the system, which glibc keeps else: some MiB in a small process."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def as_bytes(size, name: str) -> int:
    """A number of bytes, or such as `"8GiB"`, as bytes.

    Raises:
        ValueError: naming the argument.
    """
    try:
        return int(size) if isinstance(size, (int, float)) else convert_file_size_to_int(size)
    except (ValueError, OverflowError, AttributeError, TypeError) as error:
        raise ValueError(f"{name} must be a number of bytes, or such as '8GiB', not {size!r}") from error


def check_arguments(kwargs: dict):
    """Arguments of `from_pretrained` that could not be what the caller means.

    Raises:
        TypeError: naming the argument.
    """
    if isinstance(kwargs["dtype"], dict):
        raise TypeError(f"dtype must be one for the whole model, not {kwargs['dtype']!r}")
    own = {key for key in kwargs if key in KimiK26Config.fields or hasattr(KimiK26Config, key)} | {"quantization_config"}
    for key in ({*KimiK26Config.sub_configs["text_config"].fields, "use_cache"} & kwargs.keys()) - own:
        raise TypeError(f"{key} is one of text_config's: load the config, set config.text_config.{key}, and give it as config=")


def pass_over_quantization(kwargs: dict):
    """Words of INT4 are read as the folder's own config says: the library would take it for another one and refuse the folder."""
    given = kwargs.get("quantization_config")
    method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
    if getattr(method, "value", method) == "compressed-tensors":
        logger.warning("quantization_config is passed over: experts are read as the folder's own config says")
        del kwargs["quantization_config"]


def refuse_damage(cls, folder: Optional[Path], kwargs):
    """Judge a folder that the library is to load, which itself makes up what is missing.

    Left out where the caller asks for other files, another config, or for mismatches to be ignored.
    """
    other = ("state_dict", "variant", "gguf_file", "key_mapping", "ignore_mismatched_sizes", "text_config", "vision_config")
    if folder is None or any(kwargs.get(key) for key in other) or kwargs.get("use_safetensors") is False:
        return
    if not any((folder / name).exists() for name in (INDEX_FILE, SINGLE_FILE)):
        return
    config = kwargs.get("config")
    if not isinstance(config, PretrainedConfig):
        config = KimiK26Config.from_pretrained(folder if config is None else config)
    own = _own_config(folder)
    stored = _stored_dtype(own)
    with built_on_meta(stored or torch.float32):
        model = cls(copy.deepcopy(config))
    findings = findings_at_load(Checkpoint(folder), model, stored, _is_part(config, own))
    if findings:
        raise CheckpointError(folder, findings)


def _own_config(folder) -> dict:
    """The folder's own `config.json`, empty where there is none; another may have been given."""
    try:
        return KimiK26Config.get_config_dict(folder)[0]
    except OSError:
        return {}


def _is_part(config: KimiK26Config, own: dict) -> bool:
    """Whether a config that was given has fewer layers than the folder's own, or no eyes: what it leaves out is no damage."""
    blind = config.vision_config is None and own.get("vision_config") is not None
    return blind or config.text_config.num_hidden_layers < (own.get("text_config") or {}).get("num_hidden_layers", 0)


def _stored_dtype(own: dict) -> Optional[torch.dtype]:
    """What the folder's own config says; the Auto classes write the dtype asked for into the config they hand over."""
    name = own.get("dtype", own.get("torch_dtype"))
    return getattr(torch, name) if isinstance(name, str) else None


@contextmanager
def built_on_meta(dtype: torch.dtype):
    """Modules built inside have their floating-point parameters in `dtype`, on `meta`, and are not initialised."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights(), torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def _spreads(device_map, max_memory) -> bool:
    """Whether the experts are to be dealt to accelerators."""
    if isinstance(device_map, str) and device_map in STRATEGIES:
        return torch.accelerator.is_available() and (max_memory is None or not set(max_memory) <= set(OFFLOADED))
    return is_of_experts(device_map)


def _placement(model, device_map, max_memory, expert_budget) -> Placement:
    sizes, amounts = Sizes.of(model), memory(model, max_memory)
    if isinstance(device_map, str):
        device_map = plan(sizes, amounts, device_map)
    else:  # other devices are not to be used
        used = {as_device(place) for place in device_map.values()}
        amounts = {place: amount for place, amount in amounts.items() if as_device(place) in used}
    budget = None if expert_budget is None else as_bytes(expert_budget, "expert_budget")
    return Placement.of(device_map, sizes, amounts, budget)


def read_from_disk_as_stored(model: nn.Module):
    """Let what is offloaded to disk be read in its own dtype: transformers 4 has INT4 words cast to that of the model."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            index = getattr(getattr(getattr(part, "weights_map", None), "dataset", None), "index", None)
            if index:  # one for all modules
                for name, parameter in model.named_parameters():
                    if "dtype" in index.get(name, {}):
                        index[name]["dtype"] = str(parameter.dtype).removeprefix("torch.")
                return
