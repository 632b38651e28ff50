"""What all tests share. Runs before any library is imported."""

import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

# Nothing is downloaded, and copies of remote code made by one run (or library version) are not met by another.
_HOME = tempfile.TemporaryDirectory(prefix="kimi-k26-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = _HOME.name
os.environ["HF_MODULES_CACHE"] = os.path.join(_HOME.name, "modules")
os.environ.pop("TRANSFORMERS_CACHE", None)
# Without a GPU, triton's kernels run on its interpreter; it looks here when it is first imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.append(os.path.join(sys.prefix, "triton"))  # see the Makefile
# A process that a script starts in the background inherits that it ignores Ctrl-C; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden files, beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("the golden files are not beside this repository (../shared/golden)")
    return folder


@pytest.fixture
def no_graphs_of_others():
    """What `torch.compile` has made is forgotten before and after."""
    import torch

    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A small random checkpoint with INT4 experts, with this project's code attached. Tests must not write to it."""
    from kimi_k26.cli.tiny import make_tiny_checkpoint

    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")
