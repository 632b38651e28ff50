"""`kimi-k26 check` of the files beside the weights: tokenizer, chat template, processor, sampling, code."""

import base64
import json
import shutil

import pytest
import torch

from kimi_k26 import KimiK26ForConditionalGeneration, TikTokenTokenizer
from kimi_k26.cli import main
from kimi_k26.cli.check import check

from .test_check import edit_json, folder, shards, text, top  # noqa: F401

# Damage to files that the model does not read: (what is done, the file, the entry or None, words, whether the
# tokenizer loads all the same).
SMALL_FILES = {
    "bad base64": (lambda f: edit_line(f, 3, "!!! 3"), "tiktoken.model", None, "line 4", False),
    "a rank twice": (lambda f: edit_line(f, 3, f"{base64.b64encode(b'qqq').decode()} 2"), "tiktoken.model", None, "ranks", False),
    "a token twice": (lambda f: edit_line(f, 3, f"{base64.b64encode(bytes([2])).decode()} 3"), "tiktoken.model", None, "ranks", False),
    "a byte gone": (
        lambda f: edit_line(f, 65, f"{base64.b64encode(b'zzz').decode()} 65"), "tiktoken.model", None, "single byte", True),
    "no vocabulary": (lambda f: (f / "tiktoken.model").unlink(), "tiktoken.model", None, "is missing", False),
    "no tokenizer config": (lambda f: (f / "tokenizer_config.json").unlink(), "tokenizer_config.json", None, "is missing", False),
    "config cut off": (lambda f: cut_bytes(f, "tokenizer_config.json"), "tokenizer_config.json", None, "not valid JSON", False),
    "no added tokens": (
        edit_json("tokenizer_config.json", lambda c: c.pop("added_tokens_decoder")), "tokenizer_config.json", None,
        "added_tokens_decoder", False),
    "an id no number": (
        edit_json("tokenizer_config.json", lambda c: c["added_tokens_decoder"].update(x={"content": "y"})),
        "tokenizer_config.json", None, "'x'", False),
    "a token with two ids": (lambda f: rename(f, "<|im_user|>", "<|im_end|>"), "tokenizer_config.json", "<|im_end|>", "ids", False),
    "a token renamed": (lambda f: rename(f, "<|im_user|>", "<|user|>"), "tokenizer_config.json", "<|im_user|>", "missing", True),
    "an unknown pad token": (
        edit_json("tokenizer_config.json", lambda c: c.update(pad_token="[NOPE]")), "tokenizer_config.json", "pad_token",
        "'[NOPE]'", True),
    "another bos id": (top("bos_token_id", 5), "config.json", "bos_token_id", "is 5", True),
    "an end that is none": (text("eos_token_id", 5), "config.json", "text_config.eos_token_id", "is 5", True),
    "preprocessor cut off": (
        lambda f: cut_bytes(f, "preprocessor_config.json"), "preprocessor_config.json", None, "not valid JSON", True),
    "preprocessor wrong": (
        edit_json("preprocessor_config.json", lambda c: c["media_proc_cfg"].update(patch_size="x")),
        "preprocessor_config.json", None, "patch_size", True),
    "preprocessor of another model": (
        edit_json("preprocessor_config.json", lambda c: c["media_proc_cfg"].update(patch_size=5)),
        "preprocessor_config.json", "patch_size", "is 5; config.json has", True),
    "preprocessor a link to nothing": (
        lambda f: (f / "preprocessor_config.json").unlink() or (f / "preprocessor_config.json").symlink_to("nowhere"),
        "preprocessor_config.json", None, "is missing", True),
    "an end that is a list of lists": (
        edit_json("generation_config.json", lambda c: c.update(eos_token_id=[[1]])), "generation_config.json", "eos_token_id",
        "got [[1]]", True),
    "an id that is a dict": (
        edit_json("generation_config.json", lambda c: c.update(pad_token_id={"a": 1})), "generation_config.json", "pad_token_id",
        "got {'a': 1}", True),
    "a list where a number must be": (
        edit_json("generation_config.json", lambda c: c.update(top_p=[])), "generation_config.json", "top_p", "must be a number", True),
    "special tokens that are a number": (
        edit_json("tokenizer_config.json", lambda c: c.update(additional_special_tokens=5)), "tokenizer_config.json",
        "additional_special_tokens", "must be a list of tokens, got 5", False),
    "a template that shows nothing": (
        lambda f: (f / "chat_template.jinja").write_text("x"), "chat_template.jinja", None, "does not show", True),
    "template with a byte order mark": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf" + (f / "chat_template.jinja").read_bytes()), "chat_template.jinja",
        None, "byte order mark", True),
    "template that ends no turn": (
        lambda f: change_text(f / "chat_template.jinja", "<|im_end|>", ""), "chat_template.jinja", None, "never writes <|im_end|>", True),
    "template without calls": (
        lambda f: change_text(f / "chat_template.jinja", "<|tool_call_begin|>", ""), "chat_template.jinja", None, "never writes <|tool_call_begin|>", True),
    "template that shows words alone": (
        lambda f: (f / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}"), "chat_template.jinja",
        None, "does not show", True),
    "think swapped": (
        lambda f: swap(f, "<think>", "</think>"), "tokenizer_config.json", "</think>", "as published it comes behind", True),
    "an end that is not special": (
        edit_json("tokenizer_config.json", lambda c: [t.update(special=False) for t in c["added_tokens_decoder"].values()]),
        "tokenizer_config.json", "<|im_end|>", "is not special", True),
    "no end": (edit_json("generation_config.json", lambda c: c.update(eos_token_id=[])), "generation_config.json", "eos_token_id", "no token would end", True),
    "added token beyond": (
        edit_json("tokenizer_config.json", lambda c: c["added_tokens_decoder"].update({"99999": {"content": "<new>"}})),
        "tokenizer_config.json", "<new>", "outside", True),
    "no beams": (edit_json("generation_config.json", lambda c: c.update(num_beams=0)), "generation_config.json", "num_beams", "got 0", True),
    "a share above all": (edit_json("generation_config.json", lambda c: c.update(top_p=5)), "generation_config.json", "top_p", "up to 1", True),
    "half a token": (edit_json("generation_config.json", lambda c: c.update(top_k=1.5)), "generation_config.json", "top_k", "got 1.5", True),
    "sampling in words": (edit_json("generation_config.json", lambda c: c.update(do_sample="yes")), "generation_config.json", "do_sample", "'yes'", True),
    "clips too long": (
        edit_json("preprocessor_config.json", lambda c: c["media_proc_cfg"].update(temporal_merge_kernel_size=8)),
        "preprocessor_config.json", "temporal_merge_kernel_size", "up to 4 frames", True),
    "as many tokens for each picture": (
        edit_json("preprocessor_config.json", lambda c: c["media_proc_cfg"].update(fixed_output_tokens=7)), "preprocessor_config.json",
        "fixed_output_tokens", "is 7", True),
    "code gone": (lambda f: (f / "modeling_kimi_k26.py").unlink(), "modeling_kimi_k26.py", None, "is missing", True),
    "code that other code imports gone": (lambda f: (f / "text_kimi_k26.py").unlink(), "text_kimi_k26.py", None, "is missing", True),
    "code emptied": (lambda f: (f / "text_kimi_k26.py").write_text(""), "text_kimi_k26.py", None, "does not define", True),
    "code cut": (lambda f: cut_bytes(f, "response_kimi.py") or (f / "response_kimi.py").open("a").write("\ndef ("), "response_kimi.py", None, "no code", True),
    "a class that there is not": (
        edit_json("config.json", lambda c: c["auto_map"].update(AutoModel="modeling_kimi_k26.Other")), "config.json", "auto_map.AutoModel",
        "does not define", True),
    "classes that are a number": (edit_json("preprocessor_config.json", lambda c: c.update(auto_map=5)), "preprocessor_config.json", "auto_map", "got 5", True),
    "template broken": (
        lambda f: (f / "chat_template.jinja").write_text("{% if %}"), "chat_template.jinja", None, "", True),
    "a shard too many": (
        lambda f: shutil.copy(shards(f)[0], f / "model-00099-of-00099.safetensors"), "model-00099-of-00099.safetensors",
        None, "not named", True),
}  # fmt: skip


def change_text(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def swap(folder, one, other):
    def change(content):
        tokens = {token["content"]: token for token in content["added_tokens_decoder"].values()}
        tokens[one]["content"], tokens[other]["content"] = other, one

    edit_json("tokenizer_config.json", change)(folder)


def edit_line(folder, number, line):
    lines = (folder / "tiktoken.model").read_text().splitlines()
    lines[number] = line
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")


def cut_bytes(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])


def rename(folder, old, new):
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    for token in content["added_tokens_decoder"].values():
        token["content"] = new if token["content"] == old else token["content"]
    content["additional_special_tokens"] = [new if t == old else t for t in content["additional_special_tokens"]]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", SMALL_FILES)
def test_damage_beside_the_weights_is_found(folder, kind):
    damage, file, tensor, words, loads = SMALL_FILES[kind]
    damage(folder)
    findings, _ = check(folder)
    assert any(f.file == file and f.tensor == tensor and words in f.problem for f in findings), findings
    assert len(findings) <= 4, findings
    if loads:
        TikTokenTokenizer.from_pretrained(folder)
    else:
        with pytest.raises((ValueError, OSError, TypeError)):
            TikTokenTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "preprocessor_config.json"])
def test_files_that_are_nested_deeply(folder, name, capsys):
    content = json.loads((folder / name).read_text())
    deep = []
    for _ in range(600):
        deep = [deep]
    (folder / name).write_text(json.dumps({**content, "zz": deep}))
    status = main(["check", str(folder), "--json"])
    assert status == bool(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("ends", [None, [], "absent"])
def test_a_reply_must_be_able_to_end(folder, ends):
    content = json.loads((folder / "generation_config.json").read_text())
    content.pop("eos_token_id")
    (folder / "generation_config.json").write_text(json.dumps(content if ends == "absent" else {**content, "eos_token_id": ends}))
    (finding,) = check(folder)[0]
    assert (finding.file, finding.tensor) == ("generation_config.json", "eos_token_id")


def test_a_tokenizer_that_has_grown_is_found_and_loads(folder, caplog):
    tokenizer = TikTokenTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<zz>"])
    tokenizer.save_pretrained(folder)
    assert any("<zz>" in str(finding) for finding in check(folder)[0])
    model = KimiK26ForConditionalGeneration.from_pretrained(folder)
    assert "call resize_token_embeddings" in caplog.text and "<zz>" in caplog.text
    model.resize_token_embeddings(len(tokenizer))
    assert model(torch.tensor([tokenizer.encode("a<zz>")])).logits.shape[-1] == len(tokenizer)
