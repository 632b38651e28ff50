"""C++ of this project's own, compiled on first use by the machine's compiler and kept for the next time."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Optional

from filelock import FileLock
from transformers.utils import logging


logger = logging.get_logger(__name__)

FLAGS = "-O3", "-std=c++17", "-march=native", "-fPIC", "-w"
i64, address = ctypes.c_int64, ctypes.c_void_p  # as the sources take numbers and memory


def _processor_features() -> set[str]:
    """What `/proc/cpuinfo` says the processor has; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())


def may_use_tiles() -> bool:
    """Whether the processor multiplies tiles of bfloat16 (AMX) and the system lets this process; it is asked, as it wants to be."""
    if platform.system() != "Linux" or platform.machine() != "x86_64" or not {"amx_tile", "amx_bf16"} <= _processor_features():
        return False
    arch_prctl, request, tiles = 158, 0x1023, 18  # ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return ctypes.CDLL(None).syscall(arch_prctl, request, tiles) == 0


def compiled(
    name: str, source: str, needed: set[str], parallel: bool = False, depends: str = ""
) -> Optional[ctypes.CDLL]:
    """The library made of `source`, or `None`: no compiler, no such processor, or, with a warning, an error.

    It is compiled once for a machine, a compiler and `depends`: of several processes one does so, and the others wait.
    needed: features of the processor, as `/proc/cpuinfo` has them. parallel: the source uses OpenMP.
    """
    compiler = shutil.which("c++") or shutil.which("g++")
    features = _processor_features()
    if compiler is None or platform.machine() != "x86_64" or not needed <= features:
        return None
    key = "\n".join((source, compiler, *FLAGS, str(parallel), *sorted(features), depends))
    file = f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kimi_k26"
    try:
        if not (folder / file).exists():
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "compiling.lock"):
                if not (folder / file).exists():
                    _compile(compiler, source, folder / file, parallel)
        return ctypes.CDLL(str(folder / file))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning(f"The CPU's own {name} could not be compiled; other libraries do what they do.\n{error}")
        return None


def _compile(compiler: str, source: str, target: Path, parallel: bool):
    """Write the library, whole or not at all."""
    flags, link = [*FLAGS], []
    if parallel:  # its threads are PyTorch's own, whose OpenMP is in the process already
        process = ctypes.CDLL(None)
        shared = all(hasattr(process, name) for name in ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num"))
        flags.append("-fopenmp")
        link = ["-Wl,--unresolved-symbols=ignore-all"] if shared else ["-fopenmp"]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        written, built, made = (Path(folder) / name for name in ("kernels.cpp", "kernels.o", "kernels.so"))
        written.write_text(source)
        for command in ([*flags, "-c", written, "-o", built], ["-shared", built, "-o", made, *link]):
            done = subprocess.run([compiler, *map(str, command)], capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
        os.replace(made, target)
