"""Accelerators that are not there, for tests of what computes where.

Inside `PretendedDevices()` there are devices `maia:0`, `maia:1`, … (a name that PyTorch knows and has no code for).
Their tensors compute on the CPU, so that results can be compared, and keep the rules of real ones: tensors of two
devices do not meet, and only `to`, `cpu` and `copy_` go from one to another. `log` has what was done, in order.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map


NAME = "maia"
CROSSING = {"to", "cpu", "copy_"}
WAITING = {"cpu", "tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal"}
OF_THE_OUTSIDE = {torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__, torch.Tensor.is_meta.__get__}


def accelerator(index: int) -> torch.device:
    return torch.device(NAME, index)


def move(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """`module.to(device)`, which knows only devices that are there."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                there = torch.nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
                part._parameters[name] = there
    return module


class PretendedTensor(torch.Tensor):
    """What `held` is, on another device."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device | None = None, requires_grad: bool | None = None):
        if isinstance(held, PretendedTensor):  # as a parameter's class is called
            return torch.nn.Parameter(held, requires_grad=bool(requires_grad))
        shape, form = held.size(), {"dtype": held.dtype, "requires_grad": held.requires_grad}
        self = torch.Tensor._make_wrapper_subclass(cls, shape, strides=held.stride(), device=device, **form)
        self.held = held
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {}, [])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} was called past the functions that know of pretended devices")

    def __repr__(self):
        return f"{self.held!r} on {self.device}"


class PretendedDevices(TorchFunctionMode):
    """While this is entered, the devices are there.

    Attributes:
        log (`list` of `(str, str)`): functions and the devices they ran on; a function that the host waits for, or one
            from device to device, is one too: `("to", "maia:0>maia:1")`.
    """

    def __init__(self):
        super().__init__()
        self.log: list[tuple[str, str]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {}, self.log)

    def waits(self) -> int:
        """How often the host has waited for a device."""
        return sum(name in WAITING or place.endswith(">cpu") for name, place in self.log)


def _call(func, args, kwargs, log):
    if func in OF_THE_OUTSIDE:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    name, devices = getattr(func, "__name__", str(func)), []
    for leaf in tree_flatten((args, kwargs))[0]:
        if isinstance(leaf, PretendedTensor) or isinstance(leaf, torch.Tensor) and leaf.dim():
            devices.append(_device(leaf))
    here = there = devices[0] if devices else None
    if name in CROSSING:
        asked = [v for v in (*args[1:], *kwargs.values()) if isinstance(v, torch.device) or _is_name(v)]
        asked += [v.device for v in args[1:2] if isinstance(v, torch.Tensor) and name == "to"]
        there = torch.device("cpu") if name == "cpu" else torch.device(asked[0]) if asked else here
        here = devices[-1] if name == "copy_" else here
    elif len(set(devices)) > 1 and name not in ("__get__", "__set__"):
        raise RuntimeError(f"{name} got tensors of several devices: {', '.join(sorted(map(str, set(devices))))}")
    elif "device" in kwargs and kwargs["device"] is not None:
        there = torch.device(kwargs["device"])
    pretended = [device for device in (here, there) if device is not None and device.type == NAME]
    if not pretended:
        return func(*args, **kwargs)
    if name != "__get__":
        log.append((name, str(there) if here in (None, there) else f"{here}>{there}"))
    bare = tree_map(_bare, (args, kwargs))
    out = func(*bare[0], **bare[1])
    if isinstance(out, torch.Tensor) and args and out is bare[0][0]:
        if isinstance(args[0], PretendedTensor) and there == args[0].device:
            return args[0]
        if name == "to":  # to another device: never the same tensor
            out = out.clone()
    return tree_map(lambda leaf: PretendedTensor(leaf, there) if _to_wrap(leaf, there) else leaf, out)


def _device(tensor):
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.device


def _is_name(value):
    return isinstance(value, str) and value.split(":")[0] in (NAME, "cpu")


def _to_wrap(leaf, device):
    return isinstance(leaf, torch.Tensor) and not isinstance(leaf, PretendedTensor) and device.type == NAME


def _bare(leaf):
    if isinstance(leaf, PretendedTensor):
        return leaf.held
    if isinstance(leaf, torch.device) and leaf.type == NAME or _is_name(leaf):
        return torch.device("cpu")
    return leaf
