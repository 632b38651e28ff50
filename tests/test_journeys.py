"""Whole journeys, as a user makes them: a folder with code attached, the Auto classes, pipelines, saving and loading."""

import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    TextIteratorStreamer,
    pipeline,
)

from .media_samples import data_uri, make_video, picture_bytes


REMOTE = {"trust_remote_code": True}
GREEDY = {"do_sample": False, "max_new_tokens": 5}


def picture(size=(70, 56), colour="teal"):
    return Image.new("RGB", size, colour)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, dtype=torch.float32, **REMOTE)


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return AutoProcessor.from_pretrained(tiny_checkpoint, **REMOTE)


def greedy(model, inputs, steps):
    """The reference: the whole input again for every token, no cache."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    media = {key: inputs[key] for key in ("pixel_values", "grid_thws") if key in inputs}
    with torch.inference_mode():
        for _ in range(steps):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **media).logits[:, -1]
            ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
    return ids[:, inputs["input_ids"].shape[1] :]


def test_every_auto_class_gives_one_model(tiny_checkpoint, model, processor):
    inputs = processor.tokenizer("hello", return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs).logits
    assert AutoConfig.from_pretrained(tiny_checkpoint, **REMOTE).to_dict() == model.config.to_dict() | {
        "dtype": "bfloat16",
        "text_config": model.config.text_config.to_dict() | {"dtype": "bfloat16"},
        "vision_config": {k: v for k, v in model.config.vision_config.to_dict().items() if k != "dtype"},
    }
    for auto in (AutoModel, AutoModelForCausalLM):
        other = auto.from_pretrained(tiny_checkpoint, dtype=torch.float32, **REMOTE)
        with torch.inference_mode():
            assert torch.equal(other(**inputs).logits, expected)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint, **REMOTE)
    assert tokenizer("a <|im_end|>")["input_ids"] == processor.tokenizer("a <|im_end|>")["input_ids"]


def test_pictures_and_videos_in_a_padded_batch_answer_as_alone(model, processor, tmp_path):
    video = tmp_path / "clip.mp4"
    video.write_bytes(make_video(frames=12, rate=2))
    conversations = [
        [{"role": "user", "content": "hello"}],
        [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "what?"}]}],
        [
            {
                "role": "user",
                "content": [
                    {"type": "video_url", "video_url": {"url": str(video)}},
                    {"type": "text", "text": "and"},
                    {"type": "image_url", "image_url": {"url": data_uri(picture_bytes(picture((30, 90), "red")), gap=" ")}},
                ],
            }
        ],
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    processor.tokenizer.padding_side = "left"
    batch = processor.apply_chat_template(conversations, padding=True, **options)
    together = model.generate(**batch, **GREEDY, eos_token_id=None)[:, batch["input_ids"].shape[1] :]
    for row, conversation in enumerate(conversations):
        inputs = processor.apply_chat_template(conversation, **options)
        alone = model.generate(**inputs, **GREEDY, eos_token_id=None)[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(alone, greedy(model, inputs, 5))
        assert torch.equal(together[row], alone[0])


def test_pipeline_image_text_to_text(tiny_checkpoint, model, processor):
    ask = pipeline("image-text-to-text", model=str(tiny_checkpoint), dtype=torch.float32, **REMOTE)
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "what is it?"}]
    messages = [{"role": "user", "content": content}]
    answer = ask(text=messages, generate_kwargs=GREEDY, return_full_text=False)
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    expected = processor.decode(greedy(model, inputs, 5)[0], skip_special_tokens=True)
    assert answer[0]["generated_text"] == expected


def test_pipeline_text_generation(tiny_checkpoint, model, processor):
    write = pipeline("text-generation", model=str(tiny_checkpoint), dtype=torch.float32, **REMOTE)
    messages = [{"role": "user", "content": "hello"}]
    answer = write(messages, **GREEDY)[0]["generated_text"]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    expected = processor.decode(greedy(model, inputs, 5)[0], skip_special_tokens=True)
    assert answer[-1] == {"role": "assistant", "content": expected}


def test_streaming_gives_the_whole_answer(model, processor):
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "你好?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=None, streamer=streamer)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :])
    assert "".join(streamer) == answer


def test_saved_and_loaded_again_everything_is_the_same(model, processor, tmp_path):
    """What the Auto classes loaded, they save with its code; a fresh process loads the folder and answers alike."""
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    messages = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "?"}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    expected = model.generate(**inputs, **GREEDY).tolist()
    script = f"""
        import torch
        from PIL import Image
        from transformers import AutoModelForImageTextToText, AutoProcessor
        model = AutoModelForImageTextToText.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
        assert model.dtype == torch.float32 and not type(model).__module__.startswith("kimi_k26")
        image = Image.new("RGB", (70, 56), "teal")
        messages = [{{"role": "user", "content": [{{"type": "image", "image": image}}, {{"type": "text", "text": "?"}}]}}]
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        print("answer", model.generate(**inputs, do_sample=False, max_new_tokens=5).tolist())
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert f"answer {expected}" in run.stdout


def test_classes_are_imported_without_remote_code(tiny_checkpoint, model):
    from kimi_k26 import KimiK26Config, KimiK26ForConditionalGeneration, KimiK26Processor, TikTokenTokenizer

    here = KimiK26ForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    for ours, theirs in zip(here.parameters(), model.parameters()):
        assert torch.equal(ours, theirs)
    assert isinstance(here.config, KimiK26Config)
    assert isinstance(KimiK26Processor.from_pretrained(tiny_checkpoint).tokenizer, TikTokenTokenizer)
