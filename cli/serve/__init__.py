"""`kimi-k26 serve FOLDER`: an OpenAI-compatible server for one checkpoint, for the users of one machine.

`schema` reads requests, `media` loads what they show, `service` turns them into prompts; `engine` decodes all of them
together (`latents` its cache, `prefixes` what is kept of it, `sampling` the choice of tokens, `guides` what must be said);
`replies` puts tokens into OpenAI's objects; `talks` follows a request from its first byte to its last, and `app` is the
face over HTTP.
"""

import asyncio
import logging
import signal
import socket
from pathlib import Path

from .. import CommandError
from ..loading import add_options, between, end_ids, load_checkpoint


def add_arguments(parser) -> None:
    parser.add_argument("folder", type=Path, help="a checkpoint")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=between(0, 65535, int), default=8000, help="(%(default)s); 0 takes a free one")
    parser.add_argument("--model-name", action="append", metavar="NAME", help="as clients call it; the folder's name")
    parser.add_argument("--api-key", action="append", default=[], metavar="KEY", help="ask clients for it")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, one a line: other users see no file")
    add_options(parser)
    group = parser.add_argument_group("how many at once")
    group.add_argument("--max-running", type=int, default=16, help="replies decoded together (%(default)s)")
    group.add_argument("--max-waiting", type=int, default=64, help="replies in the queue; more answer 429 (%(default)s)")
    group.add_argument("--cache-memory", metavar="SIZE", help="for running and kept dialogues; a fifth of what is free")
    group.add_argument("--prefill-chunk", type=int, default=512, help="prompt tokens between two steps (%(default)s)")
    group.add_argument("--request-memory", metavar="SIZE", help="for bodies and decoded media; a fifth of what is free")
    group = parser.add_argument_group("limits of a request")
    group.add_argument("--max-length", type=int, help="tokens of prompt and reply together; the model's own")
    group.add_argument("--default-tokens", type=int, default=32768, help="of a reply that sets no limit (%(default)s)")
    group.add_argument("--max-body", default="64MiB", metavar="SIZE", help="of a request (%(default)s)")
    group.add_argument("--max-media", type=between(0, 1_000_000, int), default=32, help="pictures and videos (%(default)s)")
    group.add_argument("--max-video-seconds", type=between(0.001, 1e6), default=120.0, help="of one video (%(default)s)")
    group.add_argument("--timeout", type=between(0.001, 1e6), default=600.0, help="seconds for an answer (%(default)s)")
    group.add_argument("--allow-media-host", action="append", default=[], metavar="HOST", help="load media from it too")
    group.add_argument("--fixed-sampling", action="store_true", help="refuse other sampling settings than the model's")
    group = parser.add_argument_group("the process")
    group.add_argument("--grace", type=between(0, 1e6), default=30.0, help="seconds to finish answers when stopped (%(default)s)")
    group.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))


def run(args) -> int:
    try:
        import fastapi  # noqa: F401
        import llguidance  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise CommandError(f"this command needs {error.name}: pip install 'kimi-k26[serve]'") from error
    from .app import create_app

    logging.basicConfig(level=args.log_level.upper(), format="%(levelname)s:     %(name)s: %(message)s")
    keys = read_keys(args)
    if args.port:  # what is wrong with it is better known before the weights are loaded
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        try:
            socket.create_server((args.host, args.port), family=family).close()
        except OSError as error:
            raise CommandError(f"cannot listen on {args.host}, port {args.port}: {error.strerror or error}") from error
    service = load(args)
    app = create_app(service, keys)
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level=args.log_level,
        timeout_keep_alive=75,  # longer than clients keep idle connections, so that they close them and not we
        timeout_graceful_shutdown=int(args.grace) + 10,
    )
    # Once it has stopped, the server raises the signal that stopped it once more: being asked to stop is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    make_server(config, service.engine, args.grace).run()
    return 0


def make_server(config, engine, grace: float):
    """A server which, once it is to stop, takes nothing new, and after `grace` seconds ends the answers at work."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets=None) -> None:
            engine.close()
            timer = asyncio.get_running_loop().call_later(grace, engine.close, True)
            await super().shutdown(sockets)
            timer.cancel()

    return Server(config)


def read_keys(args) -> tuple[str, ...]:
    lines = []
    if args.api_key_file:
        try:
            lines = [line.strip() for line in args.api_key_file.read_text(encoding="utf-8-sig").splitlines()]
        except ValueError as error:
            raise CommandError(f"{args.api_key_file} is no text in UTF-8: {error}") from None
        for number, line in enumerate(lines, start=1):
            if len(line.split()) > 1:
                raise CommandError(f"{args.api_key_file}, line {number}: a key has no spaces, and nothing stands beside it")
    keys = tuple(key for key in [*args.api_key, *lines] if key)
    if (args.api_key or args.api_key_file) and not keys:
        raise CommandError("no API key was given: --api-key is empty, or the file of --api-key-file is")
    return keys


def load(args):
    """The model of `args.folder`, ready to serve."""
    import torch
    from accelerate.utils import convert_file_size_to_int

    from ...media_kimi_k26 import MediaLimits
    from .engine import Engine
    from .media import MediaPolicy
    from .service import Limits, Service

    for name in ("max_running", "max_waiting", "prefill_chunk", "max_length", "default_tokens"):
        value = getattr(args, name)
        if value is not None and value < (0 if name == "max_waiting" else 1):
            raise CommandError(f"--{name.replace('_', '-')} must be positive, got {value}")
    try:
        max_body = convert_file_size_to_int(args.max_body)
        cache_memory = args.cache_memory and convert_file_size_to_int(args.cache_memory)
        request_memory = args.request_memory and convert_file_size_to_int(args.request_memory)
    except ValueError as error:
        raise CommandError(f"sizes are such as 64MiB or 2GiB: {error}") from error
    processor, model = load_checkpoint(args.folder, args.dtype, args.memory, args.expert_budget, args.threads)
    text = model.config.text_config
    token_bytes = text.num_hidden_layers * (text.kv_lora_rank + text.qk_rope_head_dim) * model.dtype.itemsize
    tokens = max(1, int(cache_memory or free_memory(model.device) / 5) // token_bytes)
    engine = Engine(
        model,
        end_ids(model),
        rows=args.max_running,
        queue=args.max_waiting,
        chunk=args.prefill_chunk,
        cache_tokens=max(1, tokens * 3 // 4),
        prefix_tokens=tokens // 4,
    )
    media = MediaLimits(max_bytes=max_body, max_image_pixels=64_000_000, max_video_seconds=args.max_video_seconds)
    limits = Limits(
        max_body=max_body,
        max_media=args.max_media,
        max_length=min(args.max_length or text.max_position_embeddings, text.max_position_embeddings),
        default_tokens=args.default_tokens,
        seconds=args.timeout,
        memory=request_memory or free_memory(torch.device("cpu")) // 5,
        fixed_sampling=args.fixed_sampling,
        media=media,
    )
    names = args.model_name or [args.folder.resolve().name]
    return Service(model, processor, engine, names, MediaPolicy(args.allow_media_host, max_body), limits)


def free_memory(device) -> int:
    """Bytes that are free where the model is."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
