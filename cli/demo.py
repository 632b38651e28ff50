"""`kimi-k26 demo`: the small trained checkpoint shows its skills; where it is missing, a random one shows the shapes.

The trained one stands in `examples/` of a clone. An installed wheel has only the code, and makes a random one.
"""

import re
import time
from pathlib import Path

TRAINED = Path(__file__).resolve().parents[1] / "examples" / "kimi-k26-tiny"
NEW_TOKENS = 24
WIDTH = 96


def add_arguments(parser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="where pictures and videos go (%(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="a checkpoint to show; the one in examples/ if it is there")
    parser.add_argument("--random", action="store_true", help="show a checkpoint of random weights: prompts and shapes")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn and asked (%(default)s)")


def draw_picture(path: Path) -> None:
    """A picture with three figures, 336 by 224 pixels."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (336, 224), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 60, 120, 150), fill="crimson")
    draw.rectangle((140, 90, 210, 160), fill="royalblue")
    draw.polygon([(270, 50), (320, 150), (225, 150)], fill="seagreen")
    image.save(path)


def record_video(path: Path, seconds: int = 3, rate: int = 12) -> None:
    """A ball that rolls from left to right, 224 by 168 pixels, MPEG-4 in an mp4 file."""
    import av
    from PIL import Image, ImageDraw

    frames = seconds * rate
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 224, 168, "yuv420p"
        for number in range(frames):
            image = Image.new("RGB", (224, 168), "white")
            x = 10 + 160 * number // (frames - 1)
            ImageDraw.Draw(image).ellipse((x, 60, x + 44, 104), fill="darkorange")
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


def run(args) -> int:
    import torch
    from transformers import logging

    from . import showcase

    # Tensors this small gain nothing from a second thread, and lose much on a busy machine.
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)  # before anything is shown that could not be written down
    folder = args.folder or (TRAINED if TRAINED.is_dir() else None)
    try:
        if args.random or folder is None:
            show(args.out)
        else:
            showcase.show(folder, args.out, args.seed)
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    return 0


def show(out: Path) -> None:
    """Makes the checkpoint, the picture and the video in the folder `out`, and prints what the model makes of them."""
    import torch
    import transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from .tiny import make_tiny_checkpoint

    folder = make_tiny_checkpoint(out / "checkpoint")
    picture, video = out / "picture.png", out / "video.mp4"
    draw_picture(picture)
    record_video(video)

    start = time.perf_counter()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    tensors = sum(1 for _ in model.state_dict())

    print("Kimi-K2.6 in small. The weights are random: shapes, tokens and speed are real, the words are noise.\n")
    _row("checkpoint", f"{folder}, {size / 1e6:.1f} MB in {tensors:,} tensors, routed experts as INT4 words")
    _row("loaded", f"in {seconds:.1f} s by AutoProcessor and AutoModelForImageTextToText, trust_remote_code=True")
    _row("with", f"transformers {transformers.__version__}, torch {torch.__version__}")

    question = {"type": "text", "text": "What do you see?"}
    image_part = {"type": "image_url", "image_url": {"url": str(picture)}}
    video_part = {"type": "video_url", "video_url": {"url": str(video)}}
    _show(1, "Text alone", processor, model, "Which one is bigger, 9.11 or 9.9?")
    _show(2, f"A picture ({picture})", processor, model, [image_part, question])
    _show(3, f"A video ({video})", processor, model, [video_part, question])
    _show(4, "Both, without thinking", processor, model, [image_part, video_part, question], thinking=False)
    print("\nThe real checkpoint takes the same calls: `kimi-k26 attach FOLDER`, then load FOLDER as above.")


def _row(name: str, text: str) -> None:
    print(f"  {name:<13} {text}")


def _lines(prompt: str) -> list[str]:
    """A prompt in lines of at most `WIDTH` characters, none of which ends inside a word or a marker."""
    lines = [""]
    for piece in re.findall(r"<\|.*?\|>(?:×\d+)?|</?think>|[^<\s]+\s*|\s+|<", prompt):
        if len(lines[-1]) + len(piece) > WIDTH:
            lines.append("")
        lines[-1] += piece
    return lines


def _show(number: int, title: str, processor, model, content, **flags) -> None:
    """One question: what the model is given, and what it gives back."""
    import torch

    print(f"\n{number}. {title}")
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **flags
    )
    ids = inputs["input_ids"]
    prompt = processor.tokenizer.decode(ids[0])
    media = prompt.count("<|media_pad|>")
    prompt = re.sub(r"(?:<\|media_pad\|>)+", lambda run: f"<|media_pad|>×{len(run.group()) // 13}", prompt)
    for index, line in enumerate(_lines(prompt.replace("\n", "⏎"))):
        _row("" if index else "prompt", line)
    _row("input_ids", f"{tuple(ids.shape)}" + (f", of which {media} stand for what was seen" if media else ""))
    if media:
        pixels = inputs["pixel_values"]
        _row("pixel_values", f"{tuple(pixels.shape)} {str(pixels.dtype).removeprefix('torch.')}: patches of 14×14")
        clips = inputs["grid_thws"].tolist()
        _row("grid_thws", f"{clips}: frames, patch rows, patch columns of each picture or clip")

    with torch.inference_mode():
        output = model(**inputs, use_cache=True)
    layers = output.past_key_values.layers
    cached = sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))
    _row("logits", f"{tuple(output.logits.shape)}")
    each = f"{cached // ids.numel():,} bytes a token"
    _row("cache", f"{each}: one latent and one rotary key in each of {len(layers)} layers")

    start = time.perf_counter()
    answer = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
    seconds = time.perf_counter() - start
    text = processor.tokenizer.decode(answer, skip_special_tokens=True)
    _row("answer", f"{len(answer)} tokens in {seconds:.2f} s (random): {text!r:.60}")
