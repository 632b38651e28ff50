"""Shards on disk: headers, memory maps, and what is found before anything is built from a damaged folder."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_k26 import KimiK26ForConditionalGeneration
from kimi_k26.checkpoint_kimi_k26 import INDEX_FILE, Checkpoint, CheckpointError, Shard


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A copy of the small random checkpoint, of several shards, to damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def rewrite_header(path, change):
    """Let `change` edit the header of a safetensors file; the data stays."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def first_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[0]


def refused(folder):
    with pytest.raises(CheckpointError) as caught:
        KimiK26ForConditionalGeneration.from_pretrained(folder)
    return str(caught.value)


def test_tensors_are_the_bytes_of_the_file(folder):
    checkpoint = Checkpoint(folder)
    assert checkpoint.findings == []
    for shard in checkpoint.shards:
        for name, expected in load_file(shard.path).items():
            assert checkpoint.tensor(name).dtype == expected.dtype
            assert torch.equal(checkpoint.tensor(name), expected)


def test_writing_to_a_tensor_leaves_the_file_alone(folder):
    path = first_shard(folder)
    before = path.read_bytes()
    shard = Shard(path)
    name = next(name for name, entry in shard.entries.items() if entry.dtype.is_floating_point)
    shard.tensor(name).zero_()
    assert path.read_bytes() == before


def test_an_unaligned_tensor_is_read(tmp_path):
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.arange(4, dtype=torch.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    path.write_bytes(struct.pack("<Q", length + 1) + raw[8 : 8 + length] + b" " + raw[8 + length :])
    shard = Shard(path)
    assert shard.findings == []
    assert all(torch.equal(shard.tensor(name), tensor) for name, tensor in tensors.items())


def test_the_fast_way_and_the_librarys_give_the_same_model(folder):
    fast, info = KimiK26ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    # A device map for the parts is one thing the fast way leaves to the library.
    device_map = {"language_model": "cpu", "vision_tower": "cpu", "mm_projector": "cpu"}
    slow = KimiK26ForConditionalGeneration.from_pretrained(folder, device_map=device_map)
    assert not any(info.values()) and not fast.training
    theirs = dict(slow.named_parameters())
    for name, parameter in fast.named_parameters():
        assert parameter.dtype == theirs[name].dtype and parameter.requires_grad == theirs[name].requires_grad
        assert torch.equal(parameter, theirs[name])
    assert fast.generation_config.to_dict() == slow.generation_config.to_dict()
    ours, theirs = fast.config.to_dict(), slow.config.to_dict()
    theirs["vision_config"].pop("dtype", None)  # transformers 5 writes one into every part
    assert ours == theirs
    assert fast.config._attn_implementation == slow.config._attn_implementation
    assert fast.name_or_path == slow.name_or_path


def test_a_model_can_be_saved_into_the_folder_it_is_mapped_from(folder):
    model = KimiK26ForConditionalGeneration.from_pretrained(folder)
    model.save_pretrained(folder)
    again = KimiK26ForConditionalGeneration.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_saving_in_shards_again_and_again_gives_the_same_files(folder, tmp_path):
    files = []
    for turn in range(3):
        KimiK26ForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path / str(turn), max_shard_size="200KB")
        folder = tmp_path / str(turn)
        files.append({path.name: path.read_bytes() for path in folder.glob("model*")})
    assert len(files[0]) > 4 and files[0] == files[1] == files[2]
    assert Checkpoint(folder).leftovers == []


def test_dtype_is_the_checkpoints_own_or_the_one_asked_for(folder):
    assert KimiK26ForConditionalGeneration.from_pretrained(folder).dtype == torch.bfloat16
    model = KimiK26ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    dtypes = {name.rsplit(".", 1)[1]: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["weight"] == dtypes["e_score_correction_bias"] == torch.float32
    assert dtypes["weight_scale"] == torch.bfloat16 and dtypes["weight_packed"] == torch.int32


def test_a_missing_tensor_is_named(folder):
    path = first_shard(folder)
    tensors = load_file(path)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, path)
    message = refused(folder)
    assert name in message and path.name in message


def test_a_tensor_too_many_is_named(folder):
    path = first_shard(folder)
    save_file({**load_file(path), "extra.weight": torch.zeros(2)}, path)
    assert "extra.weight" in refused(folder)


@pytest.mark.parametrize("change, words", [("shape", "has shape"), ("dtype", "has dtype")])
def test_a_wrong_shape_or_dtype_is_named(folder, change, words):
    path = first_shard(folder)
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2 and tensor.is_floating_point())
    tensors[name] = tensors[name].T.contiguous()[1:] if change == "shape" else tensors[name].half()
    save_file(tensors, path)
    message = refused(folder)
    assert name in message and words in message


def test_a_truncated_shard_is_named(folder):
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:-10])
    message = refused(folder)
    assert path.name in message and "the file holds" in message


def test_overlapping_tensors_are_named(folder):
    path = first_shard(folder)

    def overlap(header):
        rows = sorted(
            (fields["data_offsets"], name) for name, fields in header.items() if name != "__metadata__"
        )
        (begin, end), name = rows[1]
        header[name]["data_offsets"] = [begin - 2, end - 2]

    rewrite_header(path, overlap)
    assert "inside" in refused(folder)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda raw: b"", "too short"),
        (lambda raw: struct.pack("<Q", 10**9) + raw[8:], "the header says"),
        (lambda raw: raw[:8] + b"x" + raw[9:], "not valid JSON"),
        (lambda raw: raw[:8] + b"\xff" + raw[9:], "not valid JSON"),
    ],
)
def test_header_damage_is_named(folder, damage, words):
    path = first_shard(folder)
    path.write_bytes(damage(path.read_bytes()))
    message = refused(folder)
    assert path.name in message and words in message


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("dtype", "F13", "has dtype"),
        ("shape", [-1], "has shape"),
        ("shape", "2", "has shape"),
        ("data_offsets", [0], "has data_offsets"),
        ("data_offsets", None, "has data_offsets"),
        ("shape", [3], "needs"),
    ],
)
def test_a_bad_header_entry_is_named(folder, key, value, words):
    path = first_shard(folder)
    names = []

    def change(header):
        names.append(next(name for name in header if name != "__metadata__"))
        header[names[0]][key] = value

    rewrite_header(path, change)
    message = refused(folder)
    assert names[0] in message and words in message


def test_an_index_that_disagrees_is_named(folder):
    index = json.loads((folder / INDEX_FILE).read_text())
    names = sorted(index["weight_map"])
    files = sorted(set(index["weight_map"].values()))
    moved = next(name for name in names if index["weight_map"][name] == files[0])
    index["weight_map"][moved] = files[1]
    (folder / INDEX_FILE).write_text(json.dumps(index))
    message = refused(folder)
    assert moved in message and files[0] in message and files[1] in message


def test_a_missing_shard_is_named(folder):
    path = first_shard(folder)
    path.unlink()
    assert path.name in refused(folder)


def test_a_shard_outside_the_folder_is_refused(folder):
    index = json.loads((folder / INDEX_FILE).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../" + index["weight_map"][name]
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert name in refused(folder)
