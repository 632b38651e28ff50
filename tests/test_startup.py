"""What importing and loading take, as `benchmarks/startup.py` measures it, and what they must not bring along."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import kimi_k26

pytestmark = pytest.mark.once

SCRIPT = Path(kimi_k26.__file__).resolve().parent / "benchmarks" / "startup.py"


def run(*options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, options)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def results(tiny_checkpoint, tmp_path_factory):
    """One round on the small checkpoint: what was printed, and the JSON."""
    out = tmp_path_factory.mktemp("startup") / "out.json"
    sources = ["--checkpoint", tiny_checkpoint, "--tokenizer", tiny_checkpoint]
    done = run(*sources, "--rounds", 1, "--threads", 1, "--json", out)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_every_row_is_measured(results):
    printed, found = results
    rows = {row["what"]: row for row in found["rows"]}
    assert list(rows)[2:] == ["`import kimi_k26`", "`from kimi_k26 import *`", "tokenizer", "processor"]
    assert all(row["count"] == 1 and row["median"] > 0 for row in rows.values())
    assert all(f"| {what} |" in printed for what in rows)


def test_memory_is_what_the_libraries_leave(results, tiny_checkpoint):
    printed, found = results
    memory, size = found["memory"], sum(path.stat().st_size for path in tiny_checkpoint.glob("*.safetensors"))
    assert memory["tokens"] == 50 and found["checkpoint"] == size
    assert memory["beyond"]["torch, transformers"] > memory["beyond"]["the base classes"] > memory["weights"]
    assert 0 < memory["weights"] < size + 2**16  # whole pages
    assert "| torch, transformers |" in printed and "times the checkpoint" in printed


@pytest.mark.parametrize("option, missing", [("--checkpoint", "config.json"), ("--tokenizer", "tiktoken.model")])
def test_a_folder_without_files_is_refused(option, missing, tmp_path, tiny_checkpoint):
    other = {"--checkpoint": "--tokenizer", "--tokenizer": "--checkpoint"}[option]
    done = run(option, tmp_path, other, tiny_checkpoint)
    assert done.returncode == 1 and f"{tmp_path}: no {missing} here" in done.stderr


def test_nothing_is_imported_that_is_not_used():
    """Beyond what the library's own base classes import."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import startup\n"
        "exec(startup.LIBRARIES); exec(startup.BASES)\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "from kimi_k26 import *\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} - before - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(SCRIPT.parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = {"kimi_k26", "av", "tiktoken", "tiktoken_ext", "accelerate", "psutil", "PIL", "jinja2", "markupsafe", "triton"}
    others = {name for name in done.stdout.split() if not name.startswith("_")}
    assert "kimi_k26" in others and others <= ours
