"""`kimi-k26 attach`: what it changes, that it changes nothing else, and that nothing can leave it half done."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_k26.cli import attach, jsontext, main, switch

MODEL = "modeling_kimi_k26.KimiK26ForConditionalGeneration"
ROOT = Path(attach.__file__).resolve().parents[1]


def published(folder: Path) -> Path:
    """A folder like the published one, without weights: its own tokenizer code, its own auto_map, odd formatting."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        '{\n    "architectures": ["KimiK25ForConditionalGeneration"],\n'
        '    "auto_map": {\n        "AutoConfig": "configuration_kimi_k25.KimiK25Config",\n'
        '        "AutoModel": "modeling_kimi_k25.KimiK25ForConditionalGeneration",\n'
        '        "AutoModelForSequenceClassification": "modeling_kimi_k25.Other"\n    },\n'
        '    "model_type": "kimi_k25",\n    "text_config": {"auto_map": {"AutoModel": "modeling_deepseek.X"},'
        ' "rms_norm_eps": 1e-5, "rope_theta": 50000.00}\n}'
    )
    (folder / "tokenizer_config.json").write_bytes(
        b'{\r\n  "model_max_length": 1000000000000000019884624838656,\r\n'
        b'  "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", null]},\r\n  "x": "\\u00e9"\r\n}\r\n'
    )
    (folder / "preprocessor_config.json").write_text(
        '{"auto_map":{"AutoProcessor":"kimi_k25_processor.KimiK25Processor"},"media_proc_cfg":{"in_patch_limit":64}}'
    )
    (folder / "chat_template.jinja").write_text("{{ 'theirs' }}")
    (folder / "generation_config.json").write_text('{"max_length": 262144}')
    (folder / "tokenization_kimi.py").write_text("THEIRS = 1\n")
    (folder / "modeling_kimi_k25.py").write_text("THEIRS = 2\n")
    (folder / "tiktoken.model").write_text("AA== 0\n")
    for number, path in enumerate(sorted(folder.iterdir())):
        os.utime(path, ns=(10**18 + number, 10**18 + number))
    os.chmod(folder / "config.json", 0o640)
    os.chmod(folder / "tokenization_kimi.py", 0o444)
    return folder


def snapshot(folder: Path) -> dict:
    """Every file with its bytes, mode and time of change; every link with its text."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_file():
            status = path.stat()
            found[name] = (path.read_bytes(), stat.S_IMODE(status.st_mode), status.st_mtime_ns, status.st_nlink)
        else:
            found[name] = "folder"
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """What a reader sees: the files in the folder itself."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def read(folder: Path, name: str):
    return json.loads((folder / name).read_bytes())


def test_attach_points_the_folder_at_the_code(tmp_path, capsys):
    folder = published(tmp_path / "model")
    before = contents(folder)
    assert main(["attach", str(folder)]) == 0
    assert "config.json" in capsys.readouterr().out

    config = read(folder, "config.json")
    assert config["auto_map"] == {
        "AutoConfig": "configuration_kimi_k26.KimiK26Config",
        "AutoModel": MODEL,
        "AutoModelForSequenceClassification": "modeling_kimi_k25.Other",
        "AutoModelForCausalLM": MODEL,
        "AutoModelForImageTextToText": MODEL,
        "AutoModelForMultimodalLM": MODEL,
    }
    old = json.loads(before["config.json"])
    assert list(config) == list(old)
    assert {**config, "auto_map": None} == {**old, "auto_map": None}
    text = (folder / "config.json").read_text()
    assert '"rms_norm_eps": 1e-5, "rope_theta": 50000.00}\n}' in text
    assert '\n        "AutoModelForImageTextToText": "modeling' in text
    assert read(folder, "tokenizer_config.json")["auto_map"] == {
        "AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]
    }
    preprocessor = read(folder, "preprocessor_config.json")
    assert preprocessor["auto_map"] == {
        "AutoProcessor": "processing_kimi_k26.KimiK26Processor",
        "AutoImageProcessor": "processing_kimi_k26.KimiK26ImageProcessor",
    }
    assert preprocessor["media_proc_cfg"] == {**attach.MEDIA_PROC_CFG, "in_patch_limit": 64}
    after = contents(folder)
    for name in ("chat_template.jinja", "generation_config.json", "modeling_kimi_k25.py", "tiktoken.model"):
        assert after[name] == before[name]
    assert after["tokenizer_config.json"] == before["tokenizer_config.json"]
    for name, data in attach.code_files().items():
        assert after[name] == data == (ROOT / name).read_bytes()
    assert stat.S_IMODE((folder / "config.json").stat().st_mode) == 0o640


def test_a_bare_folder_gets_what_it_lacks(tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "kimi_k25"}')
    attach.attach(folder)
    assert (folder / "chat_template.jinja").read_bytes() == (ROOT / "chat_template.jinja").read_bytes()
    assert read(folder, "preprocessor_config.json")["media_proc_cfg"] == attach.MEDIA_PROC_CFG
    assert not (folder / "tokenizer_config.json").exists()
    assert main(["attach", str(folder)]) == 0
    assert "no tokenizer_config.json" in capsys.readouterr().out
    attach.undo(folder)
    assert contents(folder) == {"config.json": b'{"model_type": "kimi_k25"}'}
    assert not (folder / ".kimi-k26").exists()


def test_code_comes_after_what_it_imports():
    placed = []
    for name, data in attach.code_files().items():
        for module in [line.split()[1][1:] for line in data.decode().splitlines() if line.startswith("from .")]:
            assert f"{module}.py" in placed, f"{name} stands before {module}.py"
        placed.append(name)
    assert {f"{module}.py" for module in attach.ENTRY_MODULES} <= set(placed)


@pytest.mark.parametrize("module", attach.ENTRY_MODULES)
def test_an_entry_module_names_all_it_needs(module, monkeypatch):
    # transformers 4.57 copies, from a local folder, only the modules that the entry module itself imports.
    monkeypatch.setattr(attach, "ENTRY_MODULES", (module,))
    needed = {name.removesuffix(".py") for name in attach.code_files()} - {module}
    source = (ROOT / f"{module}.py").read_text(encoding="utf-8")
    named = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE))
    assert named == needed


def test_twice_changes_nothing(tmp_path, capsys):
    folder = published(tmp_path / "model")
    attach.attach(folder)
    before, time = snapshot(folder), folder.stat().st_mtime_ns
    assert main(["attach", str(folder)]) == 0
    assert "nothing to change" in capsys.readouterr().out
    assert snapshot(folder) == before and folder.stat().st_mtime_ns == time


def test_dry_run_writes_nothing(tmp_path, capsys):
    folder = published(tmp_path / "model")
    before = snapshot(folder)
    assert main(["attach", str(folder), "--dry-run"]) == 0
    assert "would attach" in capsys.readouterr().out and snapshot(folder) == before
    attach.attach(folder)
    before = snapshot(folder)
    assert main(["attach", str(folder), "--undo", "--dry-run"]) == 0
    assert "would restore" in capsys.readouterr().out and snapshot(folder) == before


def test_undo_restores_bytes_modes_and_times(tmp_path):
    folder = published(tmp_path / "model")
    before = snapshot(folder)
    attach.attach(folder)
    assert main(["attach", str(folder), "--undo"]) == 0
    assert snapshot(folder) == before
    assert main(["attach", str(folder), "--undo"]) == 0  # nothing left to undo
    assert snapshot(folder) == before


def hub_cache(tmp_path: Path) -> Path:
    """The published folder as a hub cache keeps it: every file a link to a blob."""
    files = published(tmp_path / "published")
    snapshots, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshots.mkdir(parents=True)
    blobs.mkdir()
    for path in files.iterdir():
        shutil.copy2(path, blobs / f"blob-{path.name}")
        os.symlink(f"../../blobs/blob-{path.name}", snapshots / path.name)
    return snapshots


def test_links_of_a_hub_cache_are_replaced_not_followed(tmp_path):
    folder = hub_cache(tmp_path)
    before = snapshot(tmp_path)
    attach.attach(folder)
    blobs = {name: entry for name, entry in before.items() if name.startswith("hub/blobs/")}
    assert {name: snapshot(tmp_path)[name] for name in blobs} == blobs
    assert not (folder / "config.json").is_symlink() and (folder / "generation_config.json").is_symlink()
    assert not [path for path in folder.rglob("*") if path.is_symlink() and not path.exists()]
    attach.undo(folder)
    assert snapshot(tmp_path) == before


def test_undo_refuses_to_drop_later_changes(tmp_path, capsys):
    folder = published(tmp_path / "model")
    before = snapshot(folder)
    attach.attach(folder)
    name = list(attach.code_files())[0]
    (folder / "config.json").write_text('{"mine": true}')
    (folder / name).write_text("mine = True\n")
    changed = snapshot(folder)
    assert main(["attach", str(folder), "--undo"]) == 1
    error = capsys.readouterr().err
    assert "config.json" in error and name in error and "tokenization_kimi.py" not in error
    assert snapshot(folder) == changed
    assert main(["attach", str(folder), "--undo", "--force"]) == 0
    assert snapshot(folder) == before


def test_undo_accepts_files_restored_or_removed_by_hand(tmp_path):
    folder = published(tmp_path / "model")
    before = contents(folder)
    attach.attach(folder)
    (folder / "config.json").write_bytes(before["config.json"])
    (folder / "tokenization_kimi.py").unlink()
    attach.undo(folder)
    assert contents(folder) == before


def test_newer_code_over_older_still_undoes_to_the_original(tmp_path, monkeypatch):
    folder = published(tmp_path / "model")
    before = snapshot(folder)
    code = attach.code_files()
    older = {name: b"# older\n" + data for name, data in code.items()} | {"dropped_kimi.py": b"OLD = 1\n"}
    monkeypatch.setattr(attach, "code_files", lambda: dict(older))
    attach.attach(folder)
    assert contents(folder)["tokenization_kimi.py"].startswith(b"# older\n")
    monkeypatch.setattr(attach, "code_files", lambda: dict(code))
    attach.attach(folder)
    after = contents(folder)
    assert {name: after.get(name) for name in older} == {**code, "dropped_kimi.py": None}
    attach.undo(folder)
    assert snapshot(folder) == before


def test_what_was_there_first_outlives_changes_and_a_second_run(tmp_path, capsys):
    """An edited file that still leads to this code is no original: an undo says that it was changed, and has the one before."""
    folder = published(tmp_path / "model")
    before = snapshot(folder)
    attach.attach(folder)
    for name in ("config.json", "preprocessor_config.json"):
        content = read(folder, name)
        content["auto_map"].popitem()
        (folder / name).write_text(json.dumps({**content, "mine": 1}))
    attach.attach(folder)
    assert read(folder, "config.json")["mine"] == 1 and set(read(folder, "config.json")["auto_map"]) >= {"AutoModel", "AutoModelForCausalLM"}
    attached = snapshot(folder)
    assert main(["attach", str(folder), "--undo"]) == 1
    assert "config.json" in capsys.readouterr().err and snapshot(folder) == attached
    assert main(["attach", str(folder), "--undo", "--force"]) == 0
    assert snapshot(folder) == before


def test_a_file_downloaded_again_becomes_the_original(tmp_path):
    folder = published(tmp_path / "model")
    attach.attach(folder)
    (folder / "tokenization_kimi.py").chmod(0o644)
    (folder / "tokenization_kimi.py").write_text("THEIRS = 'a later revision'\n")
    newer = contents(folder)["tokenization_kimi.py"]
    attach.attach(folder)
    assert contents(folder)["tokenization_kimi.py"] == attach.code_files()["tokenization_kimi.py"]
    attach.undo(folder)
    assert contents(folder)["tokenization_kimi.py"] == newer


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", b'{"a": }', "config.json is not valid JSON"),
        ("config.json", b"[]", "config.json is not valid JSON"),
        ("config.json", b"\xff\xfe", "config.json is not valid JSON"),
        ("config.json", b"[" * 100_000, "config.json is not valid JSON"),
        ("config.json", b'{"model_type": "llama"}', "model_type is 'llama'"),
        ("tokenizer_config.json", b"", "tokenizer_config.json is not valid JSON"),
        ("preprocessor_config.json", b'{"a": 1,}', "preprocessor_config.json is not valid JSON"),
    ],
)
def test_a_folder_it_cannot_use_is_left_alone(tmp_path, capsys, name, data, said):
    folder = published(tmp_path / "model")
    (folder / name).unlink()
    if data is not None:
        (folder / name).write_bytes(data)
    before = snapshot(folder)
    assert main(["attach", str(folder)]) == 1
    output = capsys.readouterr()
    assert said in output.err and output.err.count("\n") == 1 and output.out == ""
    assert snapshot(folder) == before


def test_wrong_usage(tmp_path, capsys):
    assert main(["attach", str(tmp_path / "absent")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    assert main(["attach", str(tmp_path), "--force"]) == 1
    assert "--force goes with --undo" in capsys.readouterr().err
    for words in ([], ["detach"], ["attach"], ["attach", str(tmp_path), "--what"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2


def test_other_places_that_name_a_processor(tmp_path):
    folder = published(tmp_path / "model")
    (folder / "processor_config.json").write_text(
        '{"processor_class": "KimiK25Processor", "image_processor": {"image_processor_type": "X"}}'
    )
    config = read(folder, "config.json")
    config["auto_map"]["AutoProcessor"] = "kimi_k25_processor.KimiK25Processor"
    (folder / "config.json").write_text(json.dumps(config))
    attach.attach(folder)
    processor = "processing_kimi_k26.KimiK26Processor"
    written = read(folder, "processor_config.json")
    assert written["auto_map"]["AutoProcessor"] == processor == read(folder, "config.json")["auto_map"]["AutoProcessor"]
    assert written["image_processor"] == {
        "image_processor_type": "X",
        "auto_map": {"AutoImageProcessor": "processing_kimi_k26.KimiK26ImageProcessor"},
    }


def test_a_record_that_leads_out_of_the_folder_is_refused(tmp_path, capsys):
    folder = published(tmp_path / "model")
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    state = folder / ".kimi-k26"
    state.mkdir()
    entry = {"sha256": attach._digest(b"mine"), "original": None}
    (state / "record.json").write_text(json.dumps({"files": {"../outside.txt": entry}}))
    assert main(["attach", str(folder), "--undo"]) == 1
    assert "was not written by this command" in capsys.readouterr().err
    (state / "record.json").unlink()
    (state / "switch").mkdir()
    os.symlink("new", state / "switch" / "live")
    (state / "journal.json").write_text(json.dumps({"../outside.txt": {"old": False, "new": False}}))
    assert main(["attach", str(folder)]) == 1
    assert "was not written by this command" in capsys.readouterr().err
    assert outside.read_text() == "mine"


def test_a_second_run_at_the_same_time_is_refused(tmp_path, capsys):
    folder = published(tmp_path / "model")
    before = snapshot(folder)
    with switch.locked(folder):
        assert main(["attach", str(folder)]) == 1
    assert "another run" in capsys.readouterr().err and snapshot(folder) == before


def test_auto_classes_load_an_attached_folder(tmp_path, golden, tiny_checkpoint):
    import transformers

    for source in (tiny_checkpoint, golden / "tiny-int4"):
        folder = tmp_path / source.name
        folder.mkdir()
        for path in source.glob("*.*"):
            if path.is_file() and path.suffix != ".py":
                shutil.copyfile(path, folder / path.name)
        # What another program may have saved there, naming classes that transformers 5 has of its own.
        other = {"processor_class": "Kimi_K25Processor", "image_processor": {"image_processor_type": "X"}}
        if source is tiny_checkpoint:
            (folder / "processor_config.json").write_text(json.dumps(other))
        attach.attach(folder)
        for auto, expected in {
            "AutoConfig": "KimiK26Config",
            "AutoTokenizer": "TikTokenTokenizer",
            "AutoImageProcessor": "KimiK26ImageProcessor",
            "AutoProcessor": "KimiK26Processor",
            "AutoModel": "KimiK26ForConditionalGeneration",
            "AutoModelForCausalLM": "KimiK26ForConditionalGeneration",
            "AutoModelForImageTextToText": "KimiK26ForConditionalGeneration",
        }.items():
            loaded = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
            assert type(loaded).__name__ == expected
            assert type(loaded).__module__.startswith("transformers_modules."), auto


def test_python_m_runs_it(tmp_path):
    folder = published(tmp_path / "model")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(attach.__file__).parents[2]), *sys.path])}
    command = [sys.executable, "-m", "kimi_k26.cli", "attach", str(folder), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "would attach" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", '{"m": {"k": 1}}'),
        ('{"a":1,"b":2}', '{"a":1,"b":2,"m":{"k": 1}}'),
        ('{"a": 1.50}', '{"a": 1.50, "m": {"k": 1}}'),
        ('{\n "a": 1\n}\n', '{\n "a": 1,\n "m": {\n  "k": 1\n }\n}\n'),
        ('{\r\n\t"m": {\r\n\t\t"k": 0\r\n\t}\r\n}', '{\r\n\t"m": {\r\n\t\t"k": 1\r\n\t}\r\n}'),
        ('{"m": null, "m": {"j": 0}}', '{"m": null, "m": {"j": 0, "k": 1}}'),
        ('{"m": "text"}', '{"m": {"k": 1}}'),
        ('{"x": {"m": {"k": 0}}, "m": {"k": 1}}', '{"x": {"m": {"k": 0}}, "m": {"k": 1}}'),
        ('{"q": "}\\"{", "m": { }}', '{"q": "}\\"{", "m": {"k": 1}}'),
    ],
)
def test_json_text_keeps_its_style(text, expected):
    assert jsontext.put(text, ("m", "k"), 1) == expected
    assert jsontext.put(expected, ("m", "k"), 1) == expected
