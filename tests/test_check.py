"""`kimi-k26 check`: each kind of damage is found and named, loading refuses it in the same words, nothing is invented."""

import base64
import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_k26 import KimiK26ForConditionalGeneration
from kimi_k26.checkpoint_kimi_k26 import INDEX_FILE, SINGLE_FILE, Checkpoint
from kimi_k26.cli import main
from kimi_k26.cli.check import check
from kimi_k26.soundness_kimi_k26 import check_values

EXPERT = "language_model.model.layers.2.mlp.experts.3.up_proj"
ROUTER = "language_model.model.layers.1.mlp.gate"
NORM = "language_model.model.norm.weight"
EMBED = "language_model.model.embed_tokens.weight"


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def shard_of(folder, name):
    return folder / json.loads((folder / INDEX_FILE).read_text())["weight_map"][name]


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def split(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return raw[8 : 8 + length], raw[8 + length :]


def join(path, text, data):
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_json(name, change):
    def damage(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


def edit_header(name, change):
    """Let `change` edit the header entry of a tensor; the data stays."""

    def damage(folder):
        path = shard_of(folder, name)
        text, data = split(path)
        header = json.loads(text)
        change(header, header[name])
        join(path, json.dumps(header).encode(), data)

    return damage


def edit_tensor(name, change):
    """Let `change` replace or fill a tensor; all else stays."""

    def damage(folder):
        path = shard_of(folder, name)
        tensors = load_file(path)
        tensors[name] = tensors[name] if (new := change(tensors[name])) is None else new
        save_file(tensors, path, {"format": "pt"})

    return damage


def edit_bytes(change, name=NORM):
    def damage(folder):
        path = shard_of(folder, name)
        path.write_bytes(change(path.read_bytes()))

    return damage


def put(key, value):
    return lambda header, entry: entry.__setitem__(key, value)


def fill(value, *place):
    return lambda tensor: tensor.__setitem__(place or ..., value)


def drop(name):
    def damage(folder):
        path = shard_of(folder, name)
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path, {"format": "pt"})

    return damage


def add(name):
    def damage(folder):
        path = shards(folder)[0]
        save_file({**load_file(path), name: torch.zeros(2)}, path, {"format": "pt"})

    return damage


def swap_files(folder):
    first, second = shards(folder)[:2]
    spare = folder / "spare"
    first.rename(spare), second.rename(first), spare.rename(second)


def replace_shard(how):
    def damage(folder):
        path = shards(folder)[0]
        path.unlink()
        how(path)

    return damage


def twice_in_header(folder):
    text, data = split(shard_of(folder, NORM))
    entry = json.dumps({NORM: json.loads(text)[NORM]})[1:-1].encode()
    join(shard_of(folder, NORM), text.rstrip()[:-1] + b"," + entry + b"}", data)


def field_twice(folder):
    text, data = split(shard_of(folder, NORM))
    at = text.index(NORM.encode()) + len(NORM) + 3
    join(shard_of(folder, NORM), text[:at] + b'"dtype":"BF16",' + text[at:], data)


def gap(folder):
    text, data = split(path := shard_of(folder, NORM))
    header = json.loads(text)
    begin = header[NORM]["data_offsets"][0]
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= begin:
            entry["data_offsets"] = [at + 64 for at in entry["data_offsets"]]
    join(path, json.dumps(header).encode(), data[:begin] + bytes(64) + data[begin:])


def overlap(header, entry):
    entry["data_offsets"] = [at - 2 if entry["data_offsets"][0] else at + 2 for at in entry["data_offsets"]]


def in_two_shards(folder):
    path = next(path for path in shards(folder) if path != shard_of(folder, NORM))
    save_file({**load_file(path), NORM: load_file(shard_of(folder, NORM))[NORM]}, path, {"format": "pt"})


def both_layouts(folder):
    tensors = {name: tensor for path in shards(folder) for name, tensor in load_file(path).items()}
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})


def index_twice(folder):
    text = (folder / INDEX_FILE).read_text()
    at = text.index(f'"{NORM}"')
    (folder / INDEX_FILE).write_text(text[:at] + f'"{NORM}": "model-00009-of-00009.safetensors", ' + text[at:])


def weight_map(change):
    return edit_json(INDEX_FILE, lambda index: change(index["weight_map"]))


def other_file(names):
    names[NORM] = next(file for file in sorted(names.values()) if file != names[NORM])


def text(key, value):
    return edit_json("config.json", lambda config: config["text_config"].__setitem__(key, value))


def top(key, value):
    return edit_json("config.json", lambda config: config.__setitem__(key, value))


def no_quantization(config):
    del config["text_config"]["quantization_config"]


def cut_lines(folder, count):
    lines = (folder / "tiktoken.model").read_text().splitlines()
    (folder / "tiktoken.model").write_text("\n".join(lines[:-count]) + "\n")


# Damage to config and weights: (what is done, the file, a tensor or None, words).
DAMAGE = {
    # headers
    "empty file": (edit_bytes(lambda raw: b""), "shard", None, "too short"),
    "seven bytes": (edit_bytes(lambda raw: raw[:7]), "shard", None, "too short"),
    "header length one too many": (edit_bytes(lambda raw: struct.pack("<Q", len(raw)) + raw[8:]), "shard", None, "header"),
    "header length + 1": (
        edit_bytes(lambda raw: struct.pack("<Q", struct.unpack("<Q", raw[:8])[0] + 1) + raw[8:]), "shard", ..., ""),
    "header length - 1": (
        edit_bytes(lambda raw: struct.pack("<Q", struct.unpack("<Q", raw[:8])[0] - 1) + raw[8:]), "shard", ..., ""),
    "header length huge": (edit_bytes(lambda raw: b"\xff" * 8 + raw[8:]), "shard", None, "the header says"),
    "header length zero": (edit_bytes(lambda raw: bytes(8) + raw[8:]), "shard", None, "not valid JSON"),
    "header not UTF-8": (edit_bytes(lambda raw: raw[:9] + b"\xff" + raw[10:]), "shard", None, "not valid JSON"),
    "header with a bracket gone": (edit_bytes(lambda raw: raw[:8] + b" " + raw[9:]), "shard", None, "not valid JSON"),
    "name listed twice": (twice_in_header, "shard", NORM, "twice"),
    "dtype listed twice": (field_twice, "shard", NORM, "twice"),
    "format of another library": (
        edit_header(NORM, lambda header, _: header.__setitem__("__metadata__", {"format": "tf"})), "shard", ..., "'tf'"),
    "metadata no strings": (
        edit_header(NORM, lambda header, _: header.__setitem__("__metadata__", {"format": 1})), "shard", ..., "strings"),
    "entry no object": (edit_header(NORM, lambda h, _: h.__setitem__(NORM, 5)), "shard", NORM, "must have dtype"),
    "dtype unknown": (edit_header(NORM, put("dtype", "F13")), "shard", NORM, "'F13'"),
    "dtype no string": (edit_header(NORM, put("dtype", ["BF16"])), "shard", NORM, "has dtype"),
    "dtype of the same size": (edit_header(NORM, put("dtype", "F16")), "shard", NORM, "has dtype float16"),
    "words as floats": (edit_header(f"{EXPERT}.weight_packed", put("dtype", "F32")), "shard", f"{EXPERT}.weight_packed", "dtype"),
    "shape too large": (edit_header(NORM, put("shape", [129])), "shard", NORM, "needs"),
    "shape transposed": (edit_header(EMBED, lambda _, e: e["shape"].reverse()), "shard", EMBED, "has shape"),
    "shape with an axis more": (edit_header(NORM, put("shape", [1, 128])), "shard", NORM, "has shape"),
    "shape of nothing": (edit_header(NORM, put("shape", [0])), "shard", NORM, "needs"),
    "shape negative": (edit_header(NORM, put("shape", [-128])), "shard", NORM, "has shape"),
    "shape of a float": (edit_header(NORM, put("shape", [128.0])), "shard", NORM, "has shape"),
    "offsets reversed": (edit_header(NORM, lambda _, e: e["data_offsets"].reverse()), "shard", NORM, "takes the bytes"),
    "offsets negative": (edit_header(NORM, put("data_offsets", [-256, 0])), "shard", NORM, "has data_offsets"),
    "offsets huge": (edit_header(NORM, put("data_offsets", [2**70, 2**70 + 256])), "shard", NORM, "ends at byte"),
    "offsets floats": (edit_header(NORM, put("data_offsets", [0.0, 256.0])), "shard", NORM, "has data_offsets"),
    "one offset": (edit_header(NORM, put("data_offsets", [0])), "shard", NORM, "has data_offsets"),
    "tensors overlap": (edit_header(NORM, overlap), "shard", ..., "inside"),
    "gap": (gap, "shard", NORM, "begins at byte"),
    "bytes appended": (edit_bytes(lambda raw: raw + bytes(16)), "shard", None, "behind its last tensor"),
    "cut by a byte": (edit_bytes(lambda raw: raw[:-1]), "shard", ..., "the file holds"),
    "cut in half": (edit_bytes(lambda raw: raw[: len(raw) // 2]), "shard", ..., "the file holds"),
    # shards and index
    "shard missing": (replace_shard(lambda path: None), "first", None, "is missing"),
    "shard a folder": (replace_shard(lambda path: path.mkdir()), "first", None, "is a folder"),
    "shard a link to nothing": (replace_shard(lambda path: path.symlink_to("nowhere")), "first", None, "a link to nothing"),
    "shard a text": (replace_shard(lambda path: path.write_text("version https://git-lfs\n" * 9)), "first", None, "header"),
    "shard twice": (lambda folder: shutil.copy(shards(folder)[0], shards(folder)[1]), "second", ..., "as well"),
    "shards swapped": (swap_files, INDEX_FILE, ..., "but is in"),
    "index not JSON": (lambda folder: (folder / INDEX_FILE).write_text("{"), INDEX_FILE, None, "not valid JSON"),
    "index a list": (lambda folder: (folder / INDEX_FILE).write_text("[]"), INDEX_FILE, None, "not an object"),
    "index without map": (edit_json(INDEX_FILE, lambda index: index.pop("weight_map")), INDEX_FILE, None, "weight_map"),
    "index map a list": (edit_json(INDEX_FILE, lambda index: index.update(weight_map=[])), INDEX_FILE, None, "weight_map"),
    "index lists twice": (index_twice, INDEX_FILE, NORM, "twice"),
    "index lacks a tensor": (weight_map(lambda names: names.pop(NORM)), INDEX_FILE, NORM, "not in the index"),
    "index has one more": (weight_map(lambda n: n.update({"a.b": n[NORM]})), INDEX_FILE, "a.b", "does not have it"),
    "index points elsewhere": (weight_map(other_file), INDEX_FILE, NORM, "but is in"),
    "index points outside": (weight_map(lambda n: n.update({NORM: "../x.safetensors"})), INDEX_FILE, NORM, "no file"),
    "index points to a number": (weight_map(lambda n: n.update({NORM: 3})), INDEX_FILE, NORM, "no file"),
    "index names no shard": (weight_map(lambda n: n.update({NORM: "x.safetensors"})), "x.safetensors", None, "is missing"),
    "tensor in two shards": (in_two_shards, ..., NORM, "as well"),
    # tensors
    "tensor missing": (drop(NORM), INDEX_FILE, NORM, "does not have it"),
    "tensor too many": (add("extra.weight"), ..., "extra.weight", ""),
    "scales missing": (drop(f"{EXPERT}.weight_scale"), INDEX_FILE, f"{EXPERT}.weight_scale", "does not have it"),
    "fewer rows": (edit_tensor(EMBED, lambda t: t[:-1].contiguous()), "shard", EMBED, "has shape"),
    "dtype converted": (edit_tensor(EMBED, lambda t: t.float()), "shard", EMBED, "has dtype float32"),
    "bias in bfloat16": (
        edit_tensor(f"{ROUTER}.e_score_correction_bias", lambda t: t.bfloat16()), "shard",
        f"{ROUTER}.e_score_correction_bias", "has dtype bfloat16"),
    # values
    "weight_shape swapped": (edit_tensor(f"{EXPERT}.weight_shape", lambda t: t.flip(0)), "shard", f"{EXPERT}.weight_shape", "says"),
    "weight_shape off": (edit_tensor(f"{EXPERT}.weight_shape", fill(65, 0)), "shard", f"{EXPERT}.weight_shape", "says"),
    "weight_shape negative": (edit_tensor(f"{EXPERT}.weight_shape", fill(-64, 0)), "shard", f"{EXPERT}.weight_shape", "says"),
    "weight_shape zero": (edit_tensor(f"{EXPERT}.weight_shape", fill(0)), "shard", f"{EXPERT}.weight_shape", "says"),
    "scale NaN": (edit_tensor(f"{EXPERT}.weight_scale", fill(float("nan"), 5, 1)), "shard", f"{EXPERT}.weight_scale", "nan at [5, 1]"),
    "scale infinite": (edit_tensor(f"{EXPERT}.weight_scale", fill(float("inf"), 5, 1)), "shard", f"{EXPERT}.weight_scale", "inf at [5, 1]"),
    "scale zero": (edit_tensor(f"{EXPERT}.weight_scale", fill(0, 5, 1)), "shard", f"{EXPERT}.weight_scale", "0.0 at [5, 1]"),
    "scale minus zero": (edit_tensor(f"{EXPERT}.weight_scale", fill(-0.0, 5, 1)), "shard", f"{EXPERT}.weight_scale", "0.0 at [5, 1]"),
    "scales all zero": (edit_tensor(f"{EXPERT}.weight_scale", fill(0)), "shard", f"{EXPERT}.weight_scale", "at [0, 0]"),
    "scale negative": (edit_tensor(f"{EXPERT}.weight_scale", fill(-1, 5, 1)), "shard", f"{EXPERT}.weight_scale", "-1.0 at [5, 1]"),
    "weight NaN": (edit_tensor(EMBED, fill(float("nan"), 7, 3)), "shard", EMBED, "nan at [7, 3]"),
    "weight infinite": (edit_tensor(NORM, fill(float("-inf"), 9)), "shard", NORM, "-inf at [9]"),
    "bias NaN": (
        edit_tensor(f"{ROUTER}.e_score_correction_bias", fill(float("nan"), 2)), "shard",
        f"{ROUTER}.e_score_correction_bias", "nan at [2]"),
    # config
    "an expert more": (text("n_routed_experts", 17), ..., ..., "experts.16"),
    "an expert less": (text("n_routed_experts", 15), ..., ..., "experts.15"),
    "a layer more": (text("num_hidden_layers", 4), INDEX_FILE, ..., "layers.3"),
    "a layer less": (text("num_hidden_layers", 2), ..., ..., "layers.2"),
    "another dense width": (text("intermediate_size", 255), ..., ..., "the config wants"),
    "no shared expert": (text("n_shared_experts", 0), ..., ..., "shared_experts"),
    "another dtype": (top("dtype", "float16"), ..., ..., "the config wants float16"),
    "no quantization block": (edit_json("config.json", no_quantization), "config.json", None, "quantization_config"),
    "no vision": (edit_json("config.json", lambda c: c.pop("vision_config")), ..., ..., "vision_tower"),
    "vocabulary too small": (text("vocab_size", 300), "config.json", None, "vocab_size"),
    "media token beyond": (top("media_placeholder_token_id", 10**6), "config.json", None, "media_placeholder_token_id"),
    "media token another": (top("media_placeholder_token_id", 3), "config.json", "media_placeholder_token_id", "is 3"),
    "config a wrong type": (text("hidden_size", "128"), "config.json", None, "text_config.hidden_size"),
    "config an unknown scoring": (text("scoring_func", "softmax"), "config.json", None, "scoring_func"),
    "five-bit words": (
        edit_json("config.json", lambda c: c["text_config"]["quantization_config"]["config_groups"]["group_0"]["weights"]
                  .update(num_bits=5)), "config.json", None, "num_bits"),
    "another group size": (
        edit_json("config.json", lambda c: c["text_config"]["quantization_config"]["config_groups"]["group_0"]["weights"]
                  .update(group_size=64)), ..., ..., "has shape"),
    # ids beside the weights
    "generation id beyond": (
        edit_json("generation_config.json", lambda c: c.update(eos_token_id=[10**6])), "generation_config.json",
        "eos_token_id", "outside"),
    "generation file not JSON": (
        lambda folder: (folder / "generation_config.json").write_text("x"), "generation_config.json", None, "not valid JSON"),
    "ranks beyond": (
        lambda folder: (folder / "tiktoken.model").open("a").write(
            f"{base64.b64encode(b'zzzz').decode()} {len((folder / 'tiktoken.model').read_text().splitlines())}\n"),
        "tiktoken.model", None, "vocab_size"),
    "ranks cut off": (lambda f: cut_lines(f, 5), "tokenizer_config.json", "added_tokens_decoder", "begins at"),
    "an id of a byte pair": (
        edit_json("tokenizer_config.json", lambda c: c["added_tokens_decoder"].update({"7": {"content": "<low>"}})),
        "tokenizer_config.json", "<low>", "byte pair"),
}  # fmt: skip


def matches(finding, folder, file, tensor, words):
    where = {"shard": str(finding.file).startswith("model-"), "first": True, "second": True}
    at = where.get(file, finding.file == file) if file is not ... else True
    return at and (tensor is ... or finding.tensor == tensor) and words in str(finding)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_not_loaded(folder, kind):
    damage, file, tensor, words = DAMAGE[kind]
    damage(folder)
    findings, _ = check(folder)
    assert any(matches(finding, folder, file, tensor, words) for finding in findings), findings
    assert len(findings) <= 12, findings
    with pytest.raises((ValueError, OSError)) as caught:
        KimiK26ForConditionalGeneration.from_pretrained(folder)
    if file != "config.json" or tensor is not None:  # a config that is refused is so by its own words, or the library's
        assert any(str(finding) in str(caught.value) for finding in findings)


# Odd, but no reason to refuse: save_pretrained leaves such folders behind, and published indexes have wrong sizes.
ODD = {
    "index without metadata": (edit_json(INDEX_FILE, lambda index: index.pop("metadata")), INDEX_FILE, None, "metadata"),
    "index total": (edit_json(INDEX_FILE, lambda i: i["metadata"].update(total_size=7)), INDEX_FILE, None, "total_size 7"),
    "single file beside shards": (both_layouts, INDEX_FILE, None, "stands beside"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_what_is_odd_is_found_and_loaded(folder, kind):
    damage, file, tensor, words = ODD[kind]
    damage(folder)
    findings, _ = check(folder)
    assert any(matches(finding, folder, file, tensor, words) for finding in findings), findings
    KimiK26ForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_routed_experts"])
def test_no_model_of_absurd_size_is_built(folder, key):
    edit_json("config.json", lambda c: c["text_config"].update({key: 10**9}))(folder)
    assert [(f.file, f.tensor) for f in check(folder)[0]] == [("config.json", f"text_config.{key}")]


def test_a_folder_without_code_is_sound(folder):
    for path in folder.glob("*.py"):
        path.unlink()
    assert check(folder)[0] == []


def test_config_damage_that_leaves_no_model(folder):
    for damage, words in (("{", "not valid JSON"), ("[]", "not an object"), ("{}", "text_config")):
        (folder / "config.json").write_text(damage)
        findings, _ = check(folder)
        assert [finding.file for finding in findings] == ["config.json"] and words in str(findings[0])
    (folder / "config.json").unlink()
    assert [str(finding) for finding in check(folder)[0]] == ["config.json: is missing"]


def test_an_index_left_behind_is_told_but_does_not_hinder(folder):
    model = KimiK26ForConditionalGeneration.from_pretrained(folder)
    for path in shards(folder):
        path.unlink()
    (folder / INDEX_FILE).rename(folder / "index")
    model.save_pretrained(folder)
    (folder / "index").rename(folder / INDEX_FILE)
    assert [f"{f.file}: {f.problem}" for f in check(folder)[0]] == [
        f"{INDEX_FILE}: stands beside {SINGLE_FILE}, which goes before it, but names other files"
    ]
    KimiK26ForConditionalGeneration.from_pretrained(folder)


def test_nothing_is_invented(tiny_checkpoint, golden):
    for folder in (tiny_checkpoint, golden / "tiny-int4", golden / "tiny-fp32"):
        assert check(folder)[0] == []


def test_a_scale_of_zero_is_sound_where_all_words_are_zero(folder):
    path = shard_of(folder, f"{EXPERT}.weight_scale")
    assert path == shard_of(folder, f"{EXPERT}.weight_packed")
    for words in (0, -0x77777778):  # never written; eight stored 8s, which are the weight 0
        edit_tensor(f"{EXPERT}.weight_scale", fill(0, 5, 1))(folder)
        edit_tensor(f"{EXPERT}.weight_packed", fill(words, 5, slice(4, 8)))(folder)
        assert check(folder)[0] == []


def test_a_folder_of_sparse_files_is_not_judged_by_its_values_and_one_sparse_file_is_damage(folder):
    def hollow(path):
        text, data = split(path)
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + len(data))

    first, *others = shards(folder)
    hollow(first)
    if os.stat(first).st_blocks * 512 >= first.stat().st_size:
        pytest.skip("this file system has no sparse files")
    assert [(f.file, f.tensor) for f in check(folder)[0]] == [(first.name, None)]
    for path in others:
        hollow(path)
    assert check(folder)[0] == [] and "sparse" in check(folder)[1]


def test_values_are_read_in_pieces(folder, monkeypatch):
    monkeypatch.setattr("kimi_k26.soundness_kimi_k26.CHUNK", 64)
    edit_tensor(EMBED, fill(float("inf"), 300, 77))(folder)
    findings = list(check_values(Checkpoint(folder)))
    assert [(f.tensor, f.problem) for f in findings] == [(EMBED, "holds inf at [300, 77]")]


def test_large_checkpoints_load_without_a_look_at_their_values(folder, monkeypatch):
    edit_tensor(EMBED, fill(float("nan"), 7, 3))(folder)
    monkeypatch.setattr("kimi_k26.soundness_kimi_k26.VALUES_AT_LOAD", 1000)
    KimiK26ForConditionalGeneration.from_pretrained(folder)
    assert len(check(folder)[0]) == 1


def test_the_librarys_own_way_of_loading_refuses_damage_too(folder):
    device_map = {"language_model": "cpu", "vision_tower": "cpu", "mm_projector": "cpu"}
    KimiK26ForConditionalGeneration.from_pretrained(folder, device_map=device_map)
    drop(NORM)(folder)
    with pytest.raises(ValueError, match=NORM):
        KimiK26ForConditionalGeneration.from_pretrained(folder, device_map=device_map)


def test_command(folder, capsys):
    assert main(["check", str(folder)]) == 0
    assert "nothing wrong was found" in capsys.readouterr().out
    assert main(["check", "--json", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out) == []
    edit_tensor(NORM, fill(float("nan"), 9))(folder)
    assert main(["check", str(folder)]) == 1
    name = shard_of(folder, NORM).name
    assert capsys.readouterr().out.startswith(f"{name}: {NORM}: holds nan at [9]\n")
    assert main(["check", str(folder), "--json"]) == 1
    expected = {"file": name, "tensor": NORM, "problem": "holds nan at [9]"}
    assert json.loads(capsys.readouterr().out) == [expected]
    assert main(["check", str(folder / "nowhere")]) == 1
    assert "is not a folder" in capsys.readouterr().err


WIDE = 2**70


@pytest.mark.parametrize(
    "part, key, value",
    [("text_config", key, WIDE) for key in ("q_lora_rank", "v_head_dim", "intermediate_size", "n_shared_experts", "vocab_size", "hidden_size")]
    + [("vision_config", key, WIDE) for key in ("patch_size", "vt_intermediate_size", "init_pos_emb_height")]
    + [("text_config", "rope_theta", value) for value in (1, WIDE, 10**400)]
    + [("rope_scaling", key, 1e308) for key in ("factor", "beta_fast", "beta_slow", "mscale_all_dim")]
    + [("text_config", "n_shared_experts", 2**30), ("text_config", "zz", 600)],
)
def test_numbers_that_no_model_has(folder, part, key, value, capsys):
    content = json.loads((folder / "config.json").read_text())
    if key == "zz":
        for _ in range(value):
            value = [value]
    if part == "rope_scaling":
        rope = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, key: value}
        content["text_config"]["rope_scaling"] = rope
    else:
        content[part][key] = value
    (folder / "config.json").write_text(json.dumps(content))
    status = main(["check", str(folder), "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert status == bool(findings) and all(found["file"] for found in findings)
    assert findings or key == "zz"
    if value != 2**30 and key != "zz":
        assert any(key in found["problem"] for found in findings), findings
