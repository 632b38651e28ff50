"""Kimi-K2.6 for Hugging Face Transformers.

The names below are imported when they are first used (PEP 562), so that `import kimi_k26` and the commands that need
no model load neither torch nor transformers.
"""

import importlib

_MODULE_OF = {
    "KimiK26Config": "configuration_kimi_k26",
    "KimiK26TextConfig": "configuration_kimi_k26",
    "KimiK26VisionConfig": "configuration_kimi_k26",
    "TikTokenTokenizer": "tokenization_kimi",
    "ResponseParser": "response_kimi",
    "ResponseStreamer": "response_kimi",
    "parse_response": "response_kimi",
    "KimiK26ImageProcessor": "processing_kimi_k26",
    "KimiK26Processor": "processing_kimi_k26",
    "KimiK26ForConditionalGeneration": "modeling_kimi_k26",
    "QuantizedLatentCache": "cache_kimi_k26",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
