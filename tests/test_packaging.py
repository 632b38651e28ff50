"""The package as it is installed: lazy to import, complete, and the same files that remote code loads."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kimi_k26
from kimi_k26.cli import attach

ROOT = Path(kimi_k26.__file__).resolve().parent


def python(code: str, *paths: Path) -> str:
    """What a new interpreter prints that sees the package by way of `paths`."""
    search = [str(path) for path in paths] + sys.path
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = "print(sorted({'torch', 'transformers', 'numpy', 'PIL', 'av', 'tiktoken'} & set(sys.modules)))"


def test_import_is_lazy():
    assert python(f"import sys, kimi_k26; dir(kimi_k26); {HEAVY}", ROOT.parent) == "[]"


def test_attach_imports_no_library(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "kimi_k25"}')
    code = (
        "import sys; from kimi_k26.cli import main\n"
        f"assert main(['attach', {str(tmp_path)!r}]) == 0\n"
        f"{HEAVY}"
    )
    assert python(code, ROOT.parent).splitlines()[-1] == "[]"


def test_every_public_name_is_there():
    for name in kimi_k26.__all__:
        assert getattr(kimi_k26, name).__name__ == name
        assert name in dir(kimi_k26)
    with pytest.raises(AttributeError, match="no attribute 'KimiK27'"):
        kimi_k26.KimiK27


def test_help_of_every_command(capsys):
    from kimi_k26.cli import COMMANDS, main

    for words in (["--help"], *([name, "--help"] for name in COMMANDS)):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        assert "usage: kimi-k26" in capsys.readouterr().out


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that `pip install .` would install."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel takes setuptools>=77")
    source, out = tmp_path_factory.mktemp("source") / "clone", tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not in a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.once
def test_the_wheel_holds_the_package_and_no_more(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert b"kimi-k26 = kimi_k26.cli:main" in archive.read(metadata[0])
        archive.extractall(tmp_path)
    assert {f"kimi_k26/{name}" for name in attach.code_files()} | {"kimi_k26/chat_template.jinja"} <= names
    assert {name.split("/")[0] for name in names} == {"kimi_k26"}
    assert not {"kimi_k26/setup.py"} & names and not any("/tests/" in name for name in names)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "kimi_k25"}')
    code = (
        "import sys, kimi_k26; from kimi_k26.cli import main\n"
        f"assert kimi_k26.__file__.startswith({str(tmp_path)!r})\n"
        f"print(main(['attach', {str(tmp_path / 'model')!r}]))"
    )
    assert python(code, tmp_path).splitlines()[-1] == "0"
    assert (tmp_path / "model" / "modeling_kimi_k26.py").read_bytes() == (ROOT / "modeling_kimi_k26.py").read_bytes()
