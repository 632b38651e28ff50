"""One engine in a process of its own, which does what it is asked, a line of JSON at a time (text.py and vision.py ask).

    python benchmarks/engines.py kimi_k26|transformers|llama.cpp|llama.cpp-flash CHECKPOINT [--threads 2] [--device cpu]

Every engine has `prefill(rows)`, which begins anew with rows of token ids, all of one length, and `decode(steps)`,
which adds one token to each row per step. Which tokens is the caller's choice, so that all engines do the same work.
Those on PyTorch also have `see(rows, columns)`, the features of a picture of so many patches.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter


class TorchEngine:
    """What the two engines on PyTorch share."""

    def __init__(self, args):
        import torch
        import transformers
        from transformers import AutoModelForImageTextToText, CompressedTensorsConfig  # noqa: F401: part of importing

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(args.threads)
        self.torch, self.args, self.device, self.cache = torch, args, args.device, None
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}

    def prefill(self, rows):
        torch, self.cache = self.torch, None
        ids = torch.tensor(rows, device=self.device)
        with torch.inference_mode():
            start = perf_counter()
            out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            logits = out.logits[:, -1].float().cpu()
            taken = perf_counter() - start
        self.cache = out.past_key_values
        return {"seconds": taken, "logits": logits[0].tolist()}

    def decode(self, steps):
        torch, taken, chosen = self.torch, [], []
        with torch.inference_mode():
            for tokens in steps:
                ids = torch.tensor(tokens, device=self.device).unsqueeze(1)
                start = perf_counter()
                out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
                chosen.append(out.logits[:, -1].argmax(-1).tolist())
                taken.append(perf_counter() - start)
        return {"seconds": taken, "chosen": chosen}

    def see(self, rows, columns):
        """Features of a picture of noise, some numbers of them; seconds, and bytes held at most beyond what was held before."""
        torch = self.torch
        pixels = torch.randn(rows * columns, 3, 14, 14, generator=torch.Generator().manual_seed(0)).to(self.device)
        grid = torch.tensor([[1, rows, columns]], device=self.device)
        held = self.begin_memory() or torch.cuda.memory_allocated()
        with torch.inference_mode():
            start = perf_counter()
            features = self.features(pixels, grid).float().cpu().flatten()
            taken = perf_counter() - start
        some = features[:: 1 + len(features) // 10_000].tolist()
        return {"seconds": taken, "bytes": self.peak_memory() - held, "features": some}

    def begin_memory(self):
        if self.device != "cpu":
            self.torch.cuda.reset_peak_memory_stats()
            return 0
        return resident(reset=True)

    def peak_memory(self):
        return resident("VmHWM") if self.device == "cpu" else self.torch.cuda.max_memory_allocated()

    def machine(self, size=2**30, width=4096):
        """What this machine reaches: bytes per second read from memory, operations per second in products."""
        torch = self.torch
        block = torch.ones(size // 4, device=self.device)

        def best(work):
            taken = []
            for _ in range(7):
                start = perf_counter()
                result = work().flatten()[0].item()  # waits for the device
                taken.append(perf_counter() - start)
                del result
            return min(taken)

        # A processor without bfloat16 products takes minutes for what others do in a tenth of a second, and is fast in float32.
        flops = 0.0
        for dtype in (torch.bfloat16, torch.float32):
            side, seconds = 64, 0.0
            while seconds < 0.05 and side < width:
                side *= 2
                matrix = torch.ones(side, side, device=self.device, dtype=dtype)
                seconds = best(lambda: matrix @ matrix)  # noqa: B023
                flops = max(flops, 2 * side**3 / seconds)
        return {"bandwidth": block.nbytes / best(block.sum), "flops": flops}


class KimiK26(TorchEngine):
    """This project's class; experts stay INT4 words."""

    def load(self):
        from kimi_k26 import KimiK26ForConditionalGeneration

        options = {} if self.args.budget is None else {"expert_budget": self.args.budget}
        if self.device != "cpu":
            options["device_map"] = self.device
        self.model = KimiK26ForConditionalGeneration.from_pretrained(self.args.checkpoint, dtype="bfloat16", **options)

    def features(self, pixels, grid):
        return self.model.get_image_features(pixels, grid)

    def profile_seeing(self, rows, columns):
        """Milliseconds of a picture by what is being done, the longest first."""
        return self._times(lambda: self.see(rows, columns), 1)

    def profile(self, rows, steps):
        """Milliseconds of one prefill and of one decode step by what is being done, the longest first."""
        self.prefill(rows)
        self.decode(steps)
        prefill = self._times(lambda: self.prefill(rows), 1)
        return {"prefill": prefill, "decode": self._times(lambda: self.decode(steps), len(steps))}

    def _times(self, work, count):
        with named_kernels(), self.torch.profiler.profile() as profiler:
            start = perf_counter()
            work()
            whole = perf_counter() - start
        found = {event.key: event.self_cpu_time_total / 1e3 / count for event in profiler.key_averages()}
        whole *= 1e3 / count
        found["Python, and the profiler"] = whole - sum(found.values())
        return {"all": whole} | dict(sorted(found.items(), key=lambda item: -item[1])[:10])


@contextmanager
def named_kernels():
    """Let PyTorch's profiler see the calls of the native kernels, under their names."""
    from torch.profiler import record_function

    from kimi_k26.native_kimi_k26 import library

    kernels = library()
    plain = {} if kernels is None else {name: call for name, call in vars(kernels).items() if name.startswith("kimi_")}

    def named(name, call):
        def run(*args):
            with record_function(name):
                return call(*args)

        return run

    for name, call in plain.items():
        setattr(kernels, name, named(name, call))
    try:
        yield
    finally:
        for name, call in plain.items():
            setattr(kernels, name, call)


class Transformers(TorchEngine):
    """The `kimi_k25` that transformers 5 ships; it unpacks INT4 words to bfloat16 at loading."""

    def load(self):
        from checkpoints import as_transformers_has_it
        from transformers import AutoModelForImageTextToText, CompressedTensorsConfig
        from transformers.models import kimi_k25  # noqa: F401: ImportError where this version has none

        with tempfile.TemporaryDirectory() as folder:
            quantized = as_transformers_has_it(self.args.checkpoint, Path(folder))
            options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if quantized else {}
            options |= {} if self.device == "cpu" else {"device_map": self.device}
            options["dtype"] = self.torch.bfloat16
            self.model = AutoModelForImageTextToText.from_pretrained(folder, **options).eval()

    def features(self, pixels, grid):
        return self.torch.cat(self.model.get_image_features(pixels.to(self.model.dtype), grid).pooler_output)


class LlamaCpp:
    """llama.cpp on the CPU, through the C functions that llama-cpp-python binds; the checkpoint is a GGUF file."""

    PIECE = 512  # tokens at once: its own default

    def __init__(self, args, flash: bool):
        import llama_cpp
        import numpy

        self.lib, self.numpy, self.args, self.flash, self.context = llama_cpp, numpy, args, int(flash), None
        self.versions = {"llama-cpp-python": llama_cpp.__version__}
        self.batch = llama_cpp.llama_batch_init(self.PIECE, 0, 1)

    def load(self):
        self.lib.llama_backend_init()
        options = self.lib.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(str(self.args.checkpoint).encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {self.args.checkpoint}")
        self.vocabulary = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def _new_context(self, rows):
        if self.context is not None:
            self.lib.llama_free(self.context)
        options = self.lib.llama_context_default_params()
        options.n_ctx, options.n_seq_max = (len(rows[0]) + 128) * len(rows), len(rows)
        options.n_batch = options.n_ubatch = self.PIECE
        options.n_threads = options.n_threads_batch = self.args.threads
        options.flash_attn_type = self.flash
        self.context = self.lib.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make this context")

    def _run(self, tokens):
        """Let (token, place, row, whether logits are wanted) pass through the model."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for at, (token, place, row, wanted) in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, place, 1, wanted
            batch.seq_id[at][0] = row
        status = self.lib.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        self.lib.llama_synchronize(self.context)

    def _logits(self, at):
        found = self.lib.llama_get_logits_ith(self.context, at)
        return self.numpy.ctypeslib.as_array(ctypes.cast(found, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,))

    def prefill(self, rows):
        self._new_context(rows)
        self.length, logits = len(rows[0]), None
        start = perf_counter()
        for number, row in enumerate(rows):
            for first in range(0, self.length, self.PIECE):
                piece = row[first : first + self.PIECE]
                last = self.length - first - 1
                self._run([(token, first + at, number, at == last) for at, token in enumerate(piece)])
            if logits is None:
                logits = self._logits(-1).tolist()
        return {"seconds": perf_counter() - start, "logits": logits}

    def decode(self, steps):
        taken, chosen = [], []
        for tokens in steps:
            start = perf_counter()
            self._run([(token, self.length, row, True) for row, token in enumerate(tokens)])
            chosen.append([int(self._logits(row).argmax()) for row in range(len(tokens))])
            taken.append(perf_counter() - start)
            self.length += 1
        return {"seconds": taken, "chosen": chosen}

    def begin_memory(self):
        return resident(reset=True)

    def peak_memory(self):
        return resident("VmHWM")


ENGINES = {
    "kimi_k26": KimiK26,
    "transformers": Transformers,
    "llama.cpp": lambda args: LlamaCpp(args, flash=False),
    "llama.cpp-flash": lambda args: LlamaCpp(args, flash=True),
}


def resident(field: str = "VmRSS", reset: bool = False) -> int:
    """Bytes of memory this process has (`VmRSS`), or has had at most (`VmHWM`) since that was reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def answer(engine, request: dict) -> dict:
    """Do what `request["do"]` names with the other entries."""
    do = request.pop("do")
    if do == "load":
        start = perf_counter()
        engine.load()
        return {"seconds": perf_counter() - start, "versions": engine.versions}
    if do == "memory":  # from loading to so many tokens, beyond what is imported
        before = engine.begin_memory()
        engine.load()
        logits = engine.prefill([request["prompt"]])["logits"]
        tokens = [max(range(len(logits)), key=logits.__getitem__)]
        while len(tokens) < request["tokens"]:
            tokens += engine.decode([tokens[-1:]])["chosen"][0]
        return {"bytes": engine.peak_memory() - before, "tokens": tokens}
    if do == "decode":
        found = engine.decode(**request)
        return {"seconds": found["seconds"], "median": statistics.median(found["seconds"])}
    return getattr(engine, do)(**request)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("checkpoint", type=Path, help="a folder; for llama.cpp a GGUF file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=int, help="bytes of experts that this project may hold")
    args = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    engine = None
    for line in sys.stdin:
        try:
            engine = engine or ENGINES[args.engine](args)
            reply = answer(engine, json.loads(line))
        except Exception as error:  # the caller decides what an engine that cannot do something means
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
