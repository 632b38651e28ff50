import copy
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor
from transformers.processing_utils import ProcessorMixin

from kimi_k26.image_processing_kimi_k26 import KimiK26ImageProcessor
from kimi_k26.media_kimi_k26 import MediaError
from kimi_k26.processing_kimi_k26 import MEDIA_PAD, VIDEO_PLACEHOLDER, KimiK26Processor
from kimi_k26.tokenization_kimi import TikTokenTokenizer

from .media_samples import data_uri, golden_picture, make_video, numbered_frame, picture_bytes

IMAGE = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"
SMALL = Image.fromarray(golden_picture(50, 37, 1))  # 4 tokens
WIDE = Image.fromarray(golden_picture(100, 60, 2))  # 12 tokens
FRAMES = [numbered_frame(k) for k in range(75)]  # at 25 frames a second: clips of 4 and 2 frames, 6 tokens each
CLIPS = [
    f"{time}<|media_begin|>video<|media_content|>{MEDIA_PAD * 6}<|media_end|>"
    for time in ("00:00:00.000", "00:00:02.359")
]


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return KimiK26Processor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def film():
    return make_video("mp4", "mpeg4", frames=75, rate=25)


def folded(processor, ids):
    """Text of ids, runs of media pads as their length."""
    runs = rf"({re.escape(MEDIA_PAD)})+"
    return re.sub(runs, lambda run: f"[{len(run[0]) // len(MEDIA_PAD)}]", processor.decode(ids))


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def text(words):
    return {"type": "text", "text": words}


# -- placeholders


def test_pictures_and_videos_follow_the_order_of_the_prompt(processor, film):
    prompt = f"a {VIDEO_PLACEHOLDER} b {IMAGE} c {VIDEO_PLACEHOLDER} d {IMAGE}"
    output = processor(images=[SMALL, WIDE], videos=[film, FRAMES], fps=25, text=prompt, return_tensors="pt")
    assert output["grid_thws"].tolist() == [[4, 4, 6], [2, 4, 6], [1, 4, 4], [4, 4, 6], [2, 4, 6], [1, 6, 8]]
    expected = prompt.replace(VIDEO_PLACEHOLDER, "".join(CLIPS))
    before, between, after = expected.split(IMAGE)
    four, twelve = (IMAGE.replace(MEDIA_PAD, MEDIA_PAD * count) for count in (4, 12))
    expected = before + four + between + twelve + after
    assert output["input_ids"].tolist() == [processor.tokenizer(expected)["input_ids"]]
    assert output["attention_mask"].tolist() == [[1] * output["input_ids"].shape[1]]
    parts = [processor.image_processor.encode_video(film), processor.image_processor.encode_image(SMALL)]
    parts += [processor.image_processor.encode_video(FRAMES, 25), processor.image_processor.encode_image(WIDE)]
    assert torch.equal(output["pixel_values"], torch.cat([part.pixel_values for part in parts]))
    tokens = (output["input_ids"] == processor.image_token_id).sum().item()
    assert tokens == (output["grid_thws"][:, 1] * output["grid_thws"][:, 2]).sum().item() // 4


@pytest.mark.parametrize("nested", [False, True])
def test_batches(processor, nested):
    images = [[SMALL], [WIDE, SMALL], []] if nested else [SMALL, WIDE, SMALL]
    texts = [IMAGE, f"{IMAGE} and {IMAGE}", "none"]
    output = processor(images=images, text=texts, return_tensors="pt")
    assert output["grid_thws"].tolist() == [[1, 4, 4], [1, 6, 8], [1, 4, 4]]
    rows = [ids[mask == 1] for ids, mask in zip(output["input_ids"], output["attention_mask"])]
    for row, (one, pictures) in zip(rows, zip(texts, [[SMALL], [WIDE, SMALL], None])):
        assert row.tolist() == processor(images=pictures, text=one)["input_ids"][0]


def test_text_alone_passes_unchanged(processor):
    expanded = IMAGE.replace(MEDIA_PAD, MEDIA_PAD * 3) + VIDEO_PLACEHOLDER
    output = processor(text=[expanded, "x"])
    assert output["input_ids"] == processor.tokenizer([expanded, "x"])["input_ids"]
    assert set(output) == {"input_ids", "attention_mask"}
    nothing = processor(text="", return_tensors="pt")["input_ids"]
    assert nothing.shape == (1, 0) and nothing.dtype == torch.int64


def test_media_alone(processor):
    output = processor(images=SMALL, videos=[FRAMES], fps=25, return_tensors="pt")
    assert set(output) == {"pixel_values", "grid_thws"} and output["grid_thws"].tolist()[0] == [1, 4, 4]


@pytest.mark.parametrize(
    "call, words",
    [
        ({"images": [SMALL], "text": IMAGE * 2}, "2 .*media_pad.* and 1 images"),
        ({"images": [SMALL, SMALL], "text": IMAGE}, "1 .*media_pad.* and 2 images"),
        ({"images": [SMALL], "text": IMAGE + VIDEO_PLACEHOLDER}, "1 .*placeholder.* and 0 videos"),
        ({"images": [[SMALL, SMALL], []], "text": [IMAGE, IMAGE]}, r"text\[0\] has 1 .* and 2 images"),
        ({"videos": [FRAMES], "fps": 25, "text": "none"}, "0 .*placeholder.* and 1 videos"),
        ({"images": [b"junk"], "text": IMAGE}, r"images\[0\]: .*not a picture"),
        ({"audio": [1], "text": "x"}, "audio"),
        ({}, "give text"),
        ({"images": []}, "give text"),
    ],
)
def test_what_does_not_match_raises(processor, call, words):
    with pytest.raises(ValueError, match=words):
        processor(**call)


def test_wrong_arguments(processor):
    with pytest.raises(TypeError, match="text must be"):
        processor(text=[1, 2])
    with pytest.raises(TypeError, match="maximum_length"):
        processor(text="x", maximum_length=3)
    for value in (False, 0, np.zeros(3)):  # not passed over because it says no
        with pytest.raises(TypeError, match="do_resize"):
            processor(text=IMAGE, images=SMALL, do_resize=value)
    for name in ("num_frames", "size", "return_length"):  # other models' options, which no template knows either
        with pytest.raises(TypeError, match=name):
            processor(text=IMAGE, images=SMALL, **{name: 2})
        with pytest.raises(TypeError, match=name):
            processor.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=True, **{name: 2})
    with pytest.raises(ValueError, match="in_patch_limit"):
        processor(images=SMALL, text=IMAGE, in_patch_limit=0)


def test_padding_sides_and_truncation(processor):
    texts = ["one two three", IMAGE]
    for side in ("left", "right"):
        output = processor(images=[SMALL], text=texts, return_tensors="pt", padding_side=side)
        short = output["attention_mask"].sum(-1).argmin()
        assert output["attention_mask"][short][0 if side == "left" else -1] == 0
    exact = processor(images=[SMALL], text=texts, padding="max_length", max_length=40, return_tensors="np")
    assert exact["input_ids"].shape == exact["attention_mask"].shape == (2, 40)
    multiple = processor(images=[SMALL], text=texts, padding=True, pad_to_multiple_of=16)
    assert {len(row) for row in multiple["input_ids"]} == {16}
    long = IMAGE + "x y " * 50
    cut = processor(images=[SMALL], text=long, truncation=True, max_length=30)
    assert cut["input_ids"][0] == processor(images=[SMALL], text=long)["input_ids"][0][:30]
    with pytest.raises(ValueError, match="max_length=5 would keep . of 4 media tokens"):
        processor(images=[SMALL], text=long, truncation=True, max_length=5)
    with pytest.raises(ValueError, match="padding"):
        processor(images=[SMALL], text=texts, padding=False, return_tensors="pt")


def test_settings_of_one_call(processor):
    for call in ({"in_patch_limit": 4}, {"images_kwargs": {"in_patch_limit": 4}}):
        assert processor(images=WIDE, text=IMAGE, **call)["grid_thws"].tolist() == [[1, 2, 4]]
    for call in ({"sample_fps": 1.0, "fps": 25}, {"videos_kwargs": {"sample_fps": 1.0, "fps": 25}}):
        assert processor(videos=[FRAMES], text=VIDEO_PLACEHOLDER, **call)["grid_thws"].tolist() == [[3, 4, 6]]
    metadata = [{"fps": 25, "total_num_frames": 75}]
    output = processor(videos=[FRAMES], text=VIDEO_PLACEHOLDER, video_metadata=metadata)
    assert output["grid_thws"].tolist() == [[4, 4, 6], [2, 4, 6]]


def test_dtype_of_pixels_only(processor):
    output = processor(images=SMALL, text=IMAGE, return_tensors="pt").to(torch.bfloat16)
    assert output["pixel_values"].dtype == torch.bfloat16
    assert {output[key].dtype for key in ("input_ids", "attention_mask", "grid_thws")} == {torch.int64}


# -- chats


def test_golden_chats_with_media(golden, processor):
    rows = json.loads((golden / "chat.json").read_text())
    rows = [row for row in rows if "media_begin" in row["text"] or "video" in row["name"]]
    assert rows
    for row in rows:
        before = copy.deepcopy(row["messages"])
        got = processor.apply_chat_template(row["messages"], tools=row["tools"], **row["kwargs"])
        assert got == row["text"], row["name"]
        assert row["messages"] == before


def forms_of(kind, data, path, value):
    """Message parts for one picture or video in every form."""
    uri = data_uri(data, f"{kind}/x", " ")
    path.write_bytes(data)
    return [
        {"type": f"{kind}_url", f"{kind}_url": {"url": uri}},
        {"type": f"{kind}_url", f"{kind}_url": {"url": path.as_uri(), "detail": "high"}},
        {"type": f"{kind}_url", f"{kind}_url": str(path)},
        {"type": kind, "url": uri},
        {"type": kind, "url": path.as_uri()},
        {"type": kind, "path": str(path)},
        {"type": kind, "path": path},
        {"type": kind, "base64": data_uri(data).partition(",")[2]},
        {"type": kind, "base64": uri},
        {"type": kind, kind: uri},
        {"type": kind, kind: data},
        {"type": kind, kind: value},
    ]


def test_all_forms_of_a_picture_in_messages(processor, tmp_path):
    expected = processor(images=SMALL, return_tensors="pt")
    for part in forms_of("image", picture_bytes(SMALL), tmp_path / "a b.png", SMALL):
        messages = user(text("What?"), part)
        before = dict(part)
        output = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(output["pixel_values"], expected["pixel_values"])
        assert output["grid_thws"].tolist() == [[1, 4, 4]]
        assert "image<|media_content|>[4]<|media_end|>" in folded(processor, output["input_ids"][0])
        assert messages[0]["content"][1] is part and part == before


def test_all_forms_of_a_video_in_messages(processor, film, tmp_path):
    expected = processor(videos=[film], return_tensors="pt")
    for part in forms_of("video", film, tmp_path / "a b", film):
        output = processor.apply_chat_template(user(part), tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(output["pixel_values"], expected["pixel_values"])
    for part in (
        {"type": "video", "video": FRAMES, "fps": 25},
        {"type": "video", "video": np.stack(FRAMES), "fps": 25.0},
        {"type": "video", "video": {"frames": FRAMES, "fps": 25}},
    ):
        output = processor.apply_chat_template(user(part), tokenize=True, return_dict=True, return_tensors="pt")
        assert output["grid_thws"].tolist() == [[4, 4, 6], [2, 4, 6]]
        assert "".join(CLIPS) in processor.decode(output["input_ids"][0])


def test_conversations_with_media_in_a_batch(processor, film):
    pictures = [{"type": "image", "image": SMALL}, {"type": "image", "image": WIDE}]
    conversations = [
        user(pictures[1], {"type": "video", "video": film}, text("?"), pictures[0]),
        [*user(pictures[0]), {"role": "assistant", "content": "a cat"}, *user(text("and"), pictures[1])],
        user(text("no picture")),
    ]
    call = {"tokenize": True, "return_dict": True, "thinking": False}
    output = processor.apply_chat_template(conversations, return_tensors="pt", **call)
    assert output["grid_thws"].tolist() == [[1, 6, 8], [4, 4, 6], [2, 4, 6], [1, 4, 4], [1, 4, 4], [1, 6, 8]]
    for row, mask, one in zip(output["input_ids"], output["attention_mask"], conversations):
        alone = processor.apply_chat_template(one, **call)
        assert row[mask == 1].tolist() == alone["input_ids"][0]
        assert processor.decode(row[mask == 1]).endswith("<|im_assistant|>assistant<|im_middle|><think></think>")
    assert "pixel_values" not in processor.apply_chat_template(conversations[2], **call)
    ids = processor.apply_chat_template(conversations[2], tokenize=True, thinking=False)
    assert ids == [alone["input_ids"][0]]
    assert processor.apply_chat_template(conversations) == [processor.apply_chat_template(one) for one in conversations]


@pytest.mark.parametrize(
    "part, words",
    [
        ({"type": "image", "path": "no/such.png"}, "not an existing file"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, "not a picture"),
        ({"type": "image", "image": picture_bytes(WIDE)[:-100]}, "damaged or truncated"),
        ({"type": "video", "video": picture_bytes(SMALL)}, "no video stream"),
        ({"type": "video", "video": FRAMES}, "give fps"),
        ({"type": "image", "image": SMALL, "url": "x"}, "once, not as image and url"),
        ({"type": "image_url", "image_url": {"uri": "x"}}, "needs a string 'url'"),
        ({"type": "image"}, "1 image parts .* 0 images were"),
    ],
)
def test_errors_name_conversation_message_and_part(processor, part, words):
    messages = [{"role": "system", "content": "s"}, *user(text("x"), part)]
    with pytest.raises(ValueError, match=words) as caught:
        processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert "messages[1].content[1]" in str(caught.value) and "conversations" not in str(caught.value)
    with pytest.raises(ValueError) as caught:
        processor.apply_chat_template([user(text("y")), messages], tokenize=True, return_dict=True)
    assert "conversations[1].messages[1].content[1]" in str(caught.value)


def test_limits_reach_messages(processor):
    with pytest.raises(MediaError, match=r"messages\[0\]\.content\[0\]: .*max_image_pixels=100"):
        processor.apply_chat_template(
            user({"type": "image", "image": SMALL}), tokenize=True, media_limits={"max_image_pixels": 100}
        )


def test_media_given_beside_the_messages(processor):
    messages = user({"type": "image"}, {"type": "image", "image": WIDE}, {"type": "image"}, {"type": "video"})
    output = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, images=[SMALL, SMALL], videos=[FRAMES], fps=25
    )
    assert output["grid_thws"].tolist() == [[1, 4, 4], [1, 6, 8], [1, 4, 4], [4, 4, 6], [2, 4, 6]]
    with pytest.raises(ValueError, match="2 image parts .* 1 images"):
        processor.apply_chat_template(messages, tokenize=True, images=[SMALL], videos=[FRAMES], fps=25)


def test_rates_of_frames_in_the_messages(processor):
    """Given with the call, as for frames that are beside the messages."""
    film = {"type": "video", "video": FRAMES}
    call = {"tokenize": True, "return_dict": True}
    wanted = processor.apply_chat_template(user({**film, "fps": 25}, {**film, "fps": 5}), **call)
    for rates in ({"fps": [25, 5]}, {"video_metadata": [{"fps": 25}, {"fps": 5}]}):
        assert processor.apply_chat_template(user(film, film), **rates, **call)["input_ids"] == wanted["input_ids"]
    assert processor.apply_chat_template(user({**film, "fps": 25}, film), fps=5, **call)["input_ids"] == wanted["input_ids"]
    with pytest.raises(ValueError, match="fps: 1 rates were given for 2 videos"):
        processor.apply_chat_template(user(film, film), fps=[25], **call)


def test_what_the_library_says_of_texts(processor, caplog):
    messages = user({"type": "image", "image": SMALL}, text("hello"))
    call = {"tokenize": True, "return_dict": True}
    for given in ({}, {"return_tensors": "pt"}):
        output = processor.apply_chat_template([messages, user(text("hi"))], return_mm_token_type_ids=True, return_offsets_mapping=True, padding=True, **call, **given)
        ids, types = (np.asarray(output[name]) for name in ("input_ids", "mm_token_type_ids"))
        assert np.array_equal(types, ids == processor.image_token_id) and types.sum() == 4
        assert np.asarray(output["offset_mapping"]).shape == (*ids.shape, 2)
    chat = processor.apply_chat_template(messages)
    row, offsets = (processor.apply_chat_template(messages, return_offsets_mapping=True, **call)[name][0] for name in ("input_ids", "offset_mapping"))
    words = [chat[start:end] for index, (start, end) in zip(row, offsets) if index != processor.image_token_id]
    assert "".join(words) == chat.replace(MEDIA_PAD, "")
    grouped = processor(text=IMAGE, images=SMALL, text_kwargs={"return_mm_token_type_ids": True})
    assert sum(grouped["mm_token_type_ids"][0]) == 4
    plain = processor(text=IMAGE, images=SMALL, return_length=False)  # which is what it does
    assert processor(text=IMAGE, images=SMALL, do_sample=False, temperature=0.7)["input_ids"] == plain["input_ids"]
    assert "['do_sample', 'temperature'] are for `generate`" in caplog.text


def test_arguments_in_groups(processor):
    """The library's `…_kwargs` say the same as the arguments themselves."""
    messages = user({"type": "video"})
    call = {"tokenize": True, "return_dict": True, "videos": [FRAMES]}
    plain = processor.apply_chat_template(messages, fps=25, return_tensors="pt", **call)
    grouped = processor.apply_chat_template(messages, videos_kwargs={"fps": 25}, common_kwargs={"return_tensors": "pt"}, **call)
    assert torch.equal(plain["input_ids"], grouped["input_ids"]) and torch.equal(plain["grid_thws"], grouped["grid_thws"])
    for group in ("common_kwargs", "text_kwargs"):
        assert isinstance(processor(text="x", **{group: {"return_tensors": "pt"}})["input_ids"], torch.Tensor)
    gray = np.stack(FRAMES)[..., 1]
    prompt = "<|kimi_k25_video_placeholder|>"
    one, other = processor(text=prompt, videos=gray, fps=25), processor(text=prompt, videos=list(gray), fps=25)
    assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_assistant_mask_covers_the_assistants_words(processor, film):
    messages = [
        *user(text("look"), {"type": "image", "image": WIDE}, {"type": "video", "video": film}),
        {"role": "assistant", "content": "two of them"},
        *user(text("sure?")),
        {"role": "assistant", "content": "yes", "reasoning": "counting again"},
    ]
    call = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, "return_tensors": "pt"}
    output = processor.apply_chat_template([messages, messages[2:]], preserve_thinking=True, **call)
    assert output["assistant_masks"].shape == output["input_ids"].shape
    spoken = [processor.decode(ids[mask == 1]) for ids, mask in zip(output["input_ids"], output["assistant_masks"])]
    last = "counting again</think>yes<|im_end|>"
    assert spoken == ["two of them<|im_end|>" + last, last]
    with pytest.raises(ValueError, match="return_dict"):
        processor.apply_chat_template(messages, return_assistant_tokens_mask=True)


def test_continuing_a_message_and_tools(processor):
    messages = [*user({"type": "image", "image": SMALL}), {"role": "assistant", "content": [text("It shows")]}]
    output = processor.apply_chat_template(messages, tokenize=True, return_dict=True, continue_final_message=True)
    assert processor.decode(output["input_ids"][0]).endswith("It shows")
    tools = [{"type": "function", "function": {"name": "zoom", "parameters": {"type": "object", "properties": {}}}}]
    assert "zoom" in processor.apply_chat_template(user(text("x")), tools=tools)
    with pytest.raises(ValueError, match="empty"):
        processor.apply_chat_template([])


def test_chat_templates_by_name_and_text(processor):
    templates = {"default": "D", "other": "{{ messages|length }}"}
    one = KimiK26Processor(processor.image_processor, processor.tokenizer, templates)
    assert one.apply_chat_template(user(text("x"))) == "D"
    assert one.apply_chat_template(user(text("x")), chat_template="other") == "1"
    assert one.apply_chat_template(user(text("x")), chat_template="T{{ shout }}", shout="!") == "T!"


# -- counting, saving, loading


def test_counters(processor):
    for picture in (SMALL, WIDE):
        ids = processor(images=picture, text=IMAGE)["input_ids"][0]
        assert ids.count(processor.image_token_id) == processor.get_num_image_tokens(picture.height, picture.width)
    ids = processor(videos=[FRAMES], fps=25, text=VIDEO_PLACEHOLDER)["input_ids"][0]
    assert ids.count(processor.image_token_id) == processor.get_num_video_tokens(48, 64, num_frames=75, fps=25)
    counted = processor._get_num_multimodal_tokens(image_sizes=[(37, 50), (60, 100)], video_sizes=[(6, 48, 64)])
    assert counted["num_image_tokens"] == [4, 12] and counted["num_image_patches"] == [16, 48]
    assert counted["num_video_tokens"] == [12]


def test_what_other_engines_ask_for(processor):
    """They count the tokens of pictures, write as many pads into the prompt themselves, and give both."""
    assert processor.media_processor is processor.image_processor
    counts = [processor.media_processor.media_tokens_calculator({"type": "image", "image": one}) for one in (SMALL, WIDE)]
    assert counts == [4, 12]
    prompt, medias = f"a {IMAGE} b {IMAGE}", [{"type": "image", "image": one} for one in (SMALL, WIDE)]
    ours = processor(images=[SMALL, WIDE], text=prompt, return_tensors="pt")
    first, second, last = prompt.split(MEDIA_PAD)
    prompt = first + MEDIA_PAD * 4 + second + MEDIA_PAD * 12 + last
    theirs = processor(text=[prompt], medias=medias, padding=True, return_tensors="pt", device="cpu")
    assert set(theirs) == set(ours) and all(torch.equal(theirs[key], ours[key]) for key in ours)
    assert set(processor(text="a", medias=[])) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("media", [SMALL, {"type": "video", "video": "a"}, {"type": "image"}])
def test_medias_of_another_form(processor, media):
    with pytest.raises(ValueError, match="'type': 'image'"):
        processor.media_processor.media_tokens_calculator(media)
    with pytest.raises(ValueError, match=r"medias\[0\]"):
        processor(text=MEDIA_PAD, medias=[media])
    with pytest.raises(ValueError, match="without images"):
        processor(text=MEDIA_PAD, images=SMALL, medias=[{"type": "image", "image": SMALL}])


def test_what_the_library_asks_for(processor):
    assert isinstance(processor, ProcessorMixin)
    assert processor.model_input_names == ["input_ids", "attention_mask", "pixel_values", "grid_thws"]
    ids = processor.tokenizer("hello<|im_end|>")["input_ids"]
    assert processor.batch_decode([ids]) == ["hello<|im_end|>"] and processor.decode(ids) == "hello<|im_end|>"
    assert processor.post_process_image_text_to_text(torch.tensor([ids])) == ["hello"]
    assert "KimiK26Processor" in repr(processor)


def test_what_it_says_of_itself_takes_no_copy_of_the_vocabulary(processor, monkeypatch):
    def refuse(self, memo):
        raise AssertionError("the tokenizer is copied")

    monkeypatch.setattr(TikTokenTokenizer, "__deepcopy__", refuse, raising=False)
    assert "KimiK26Processor" in repr(processor)
    assert processor.to_dict()["processor_class"] == "KimiK26Processor" and "tokenizer" not in processor.to_dict()
    assert processor.tokenizer is not None


def test_golden_folder_without_media_files(golden):
    processor = KimiK26Processor.from_pretrained(golden / "vocab", in_patch_limit=4)
    assert isinstance(processor.image_processor, KimiK26ImageProcessor)
    output = processor(images=WIDE, text=IMAGE)
    assert output["grid_thws"].tolist() == [[1, 2, 4]]
    assert output["input_ids"][0].count(163605) == 2


def test_saved_and_loaded_without_remote_code(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"tiktoken.model", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"} <= names
    assert "processor_config.json" not in names
    assert "media_proc_cfg" in json.loads((tmp_path / "preprocessor_config.json").read_text())
    again = KimiK26Processor.from_pretrained(tmp_path)
    assert again.chat_template == processor.chat_template
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    messages = user({"type": "image", "image": SMALL})
    assert again.apply_chat_template(messages, tokenize=True) == processor.apply_chat_template(messages, tokenize=True)


def test_auto_classes(tiny_checkpoint, processor, tmp_path):
    messages = user(text("x"), {"type": "image", "image": SMALL})
    expected = processor.apply_chat_template(messages, tokenize=True)
    picture = processor.image_processor.encode_image(SMALL).pixel_values
    folder = tiny_checkpoint
    for step in ("attached", "saved"):  # what is saved loads again, with its code
        image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
        assert type(image_processor).__name__ == "KimiK26ImageProcessor"
        assert torch.equal(image_processor(SMALL, return_tensors="pt")["pixel_values"], picture)
        loaded = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        assert type(loaded).__name__ == "KimiK26Processor"
        assert type(loaded).__module__.startswith("transformers_modules.")
        assert loaded.apply_chat_template(messages, tokenize=True) == expected
        folder = tmp_path / f"{step}-again"
        loaded.save_pretrained(folder)
