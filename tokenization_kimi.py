"""Text ⇄ ids: the byte-pair vocabulary of `tiktoken.model` behind the library's tokenizer interface.

Ids run over the byte-pair ranks of the file, then 256 special ids. The special ones that `tokenizer_config.json` names
(`added_tokens_decoder`) bear those names, the others are `<|reserved_token_ID|>`; tokens a user adds come after them.
Text goes to tiktoken in long pieces and comes back from a table of all tokens' bytes: nothing here works token by token,
except where the caller asks for tokens as strings.
"""

import functools
import inspect
import json
import os
from typing import Any

import numpy as np
import tiktoken
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer
from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy
from transformers.utils import logging

from .chat_kimi import ControlText, describe, is_batch_of_chats, render_chats
from .response_kimi import parse_response
from .text_ids_kimi import TextIds
from .token_bytes_kimi import TokenBytes
from .vocabulary_kimi import SPECIAL_IDS, SPLIT_PATTERN, printable, read_ranks, spelled, write_ranks

# Version 4 of the library copies from a local folder only those modules that the loaded one names itself.
from .tool_declaration_kimi import tool_schemas  # noqa: F401


logger = logging.get_logger(__name__)

VOCAB_FILES_NAMES = {"vocab_file": "tiktoken.model"}
# What a chat gives by default: ids in version 4, a dict in version 5.
_RETURNS_DICT = inspect.signature(PreTrainedTokenizer.apply_chat_template).parameters["return_dict"].default


class TikTokenTokenizer(PreTrainedTokenizer):
    """The Kimi-K2.6 tokenizer.

    No token is added to a text by itself, no `[BOS]` either. Special tokens written in a text become their ids, unless a
    call says `split_special_tokens=True` (the library's word) or `allow_special_tokens=False` (the published one).
    `skip_special_tokens=True` drops the tokens marked `special` in `tokenizer_config.json`: not the markers of thinking and
    tool calls, which belong to the reply, and not the reserved ones, which no reply should hold.

    Args:
        vocab_file: path of `tiktoken.model`.
        added_tokens_decoder: id → `AddedToken`, from `tokenizer_config.json`. Must name the special tokens.
        kwargs: as for every tokenizer of the library.

    Raises:
        ValueError: the vocabulary file is malformed, none of the 256 special ids has a name, or special tokens are no list.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str | os.PathLike,
        bos_token: str | AddedToken = "[BOS]",
        eos_token: str | AddedToken = "[EOS]",
        unk_token: str | AddedToken | None = "[UNK]",
        pad_token: str | AddedToken | None = "[PAD]",
        added_tokens_decoder: dict[int, AddedToken] | None = None,
        **kwargs,
    ):
        if vocab_file is None:  # what the library hands in for a folder without the file
            raise ValueError(f"there is no {VOCAB_FILES_NAMES['vocab_file']} in {kwargs.get('name_or_path', 'the folder')}")
        ranks = read_ranks(vocab_file)
        added = dict(added_tokens_decoder or {})
        special_ids = range(len(ranks), len(ranks) + SPECIAL_IDS)
        if not any(index in added for index in special_ids):
            raise ValueError(
                f"added_tokens_decoder names none of the special ids {special_ids[0]} to {special_ids[-1]} that follow "
                f"the {len(ranks)} tokens of {vocab_file}; given were {sorted(added) or 'no ids'}. It is read from "
                "tokenizer_config.json, which must belong to the same vocabulary."
            )
        specials = {str(added.get(index, f"<|reserved_token_{index}|>")): index for index in special_ids}
        clash = [name for name in specials if name.encode() in ranks]
        if clash or len(specials) < SPECIAL_IDS:
            raise ValueError(f"special tokens must differ from each other and from the vocabulary; see {clash or added}")
        self._encoding = tiktoken.Encoding("kimi", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials)

        for name in ("extra_special_tokens", "additional_special_tokens"):
            if not isinstance(kwargs.get(name) or [], (list, tuple, dict)):
                raise ValueError(f"{name} must be a list of tokens, got {kwargs[name]!r}")
        # The library lists the special tokens twice: here, and by flag in added_tokens_decoder. Version 5 renamed the
        # list; it is kept under the old name, which both read.
        listed = kwargs.pop("extra_special_tokens", None)
        if isinstance(listed, dict):
            kwargs["extra_special_tokens"] = listed
        elif listed:
            kwargs["additional_special_tokens"] = list(listed)
        if not kwargs.get("additional_special_tokens"):
            named = {str(token) for token in (bos_token, eos_token, unk_token, pad_token)}
            flagged = [str(added[index]) for index in sorted(added) if added[index].special]
            kwargs["additional_special_tokens"] = [token for token in flagged if token not in named]
        if not kwargs.get("extra_special_tokens"):
            kwargs.pop("extra_special_tokens", None)

        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token=pad_token,
            added_tokens_decoder=added,
            **kwargs,
        )

    @classmethod
    def _from_pretrained(cls, *args, **kwargs):
        try:
            return super()._from_pretrained(*args, **kwargs)
        except ImportError as error:
            # Without protobuf, version 4 hides whatever __init__ raised behind its wish for protobuf.
            if isinstance(error.__context__, (ValueError, TypeError)):
                raise error.__context__ from None
            raise

    # ---- Vocabulary ----

    @property
    def vocab_size(self) -> int:
        """Ids of the byte pairs and the 256 special ones, without tokens a user added; `len(tokenizer)` counts those."""
        return self._encoding.n_vocab

    @functools.cached_property
    def _tokens(self) -> list[str]:
        """Byte pairs and special tokens as strings. Made when first asked for: that takes a quarter of the time of all loading."""
        return [*map(printable, self._encoding._mergeable_ranks), *self._encoding._special_tokens]

    @functools.cached_property
    def _token_ids(self) -> dict[str, int]:
        return dict(zip(self._tokens, range(self.vocab_size)))

    def get_vocab(self) -> dict[str, int]:
        return {**self._token_ids, **self._added_tokens_encoder}

    def _own_id(self, token: str) -> int | None:
        """What `get_vocab` says of a token that no user added, without the whole of it."""
        index = self._encoding._special_tokens.get(token)
        if index is None and isinstance(token, str):
            pair = spelled(token)
            index = self._encoding._mergeable_ranks.get(pair) if printable(pair) == token else None
        return index

    def _add_tokens(self, new_tokens, special_tokens: bool = False) -> int:
        if not new_tokens:
            self._update_trie()  # none, as at loading: the library would make the whole vocabulary to look for it
            self._update_total_vocab_size()
            return 0
        for name in map(str, new_tokens):
            # The library looks names up in `get_vocab`, where byte pairs have the printable form of their bytes.
            index = self._own_id(name)
            if index is not None and index < len(self._encoding._mergeable_ranks) and spelled(name) != name.encode():
                raise ValueError(f"{name!r} cannot be added: in this vocabulary it is how the bytes {spelled(name)!r} are written (id {index})")
        return super()._add_tokens(new_tokens, special_tokens)

    def _update_total_vocab_size(self):
        # The library calls this whenever the added tokens have changed.
        self.total_vocab_size = self.vocab_size + sum(self._own_id(name) is None for name in self._added_tokens_encoder)
        self._late_tokens = {i: t.content for i, t in self._added_tokens_decoder.items() if i >= self.vocab_size}
        self._token_bytes = None
        self._text_ids = TextIds(self._encoding, self._added_tokens_decoder)

    def _convert_token_to_id(self, token: str) -> int:
        index = self._own_id(token)
        return self.unk_token_id if index is None else index

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"token id {index} is outside the vocabulary, 0 to {len(self) - 1}")
        return self._tokens[index]

    def _special_ids(self) -> set[int]:
        named = set(self.all_special_ids) - {None}  # None: a name without id, in a tokenizer without [UNK]
        return named | {index for index, token in self._added_tokens_decoder.items() if token.special}

    def convert_ids_to_tokens(self, ids, skip_special_tokens: bool = False) -> str | list[str]:
        """Ids → tokens as strings, one printable character per byte (special and added tokens as they are written)."""
        ids = _as_python(ids)
        if isinstance(ids, list):
            skipped = self._special_ids() if skip_special_tokens else ()
            return [self.convert_ids_to_tokens(index) for index in ids if index not in skipped]
        index = int(ids)
        token = self._added_tokens_decoder.get(index)
        return token.content if token is not None else self._convert_id_to_token(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Tokens as strings → the text they spell; bytes that are not UTF-8 become U+FFFD."""
        added = self._added_tokens_encoder
        parts = [token.encode("utf-8", errors="replace") if token in added else spelled(token) for token in tokens]
        return b"".join(parts).decode("utf-8", errors="replace")

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list[int]:
        return token_ids_0 if token_ids_1 is None else token_ids_0 + token_ids_1

    # ---- Text → ids ----

    def control_tokens(self, chat_template: str = "") -> frozenset[str]:
        """The tokens that words in a chat must not become: the 256 special ones, those a user added as special, and of
        other added ones those that `chat_template` writes, unless they are plain words."""
        added = self._added_tokens_decoder.values()
        written = {t.content for t in added if t.content in chat_template and not t.content.strip().isalnum()}
        return frozenset(written.union(self._encoding._special_tokens, (t.content for t in added if t.special)))

    def encode(self, text, text_pair=None, add_special_tokens: bool = True, **kwargs):
        """Text (or tokens as strings, or ids) → list of ids, or a tensor `(1, n)` with `return_tensors`."""
        if isinstance(text, (list, tuple)) and text and isinstance(text[0], str) and not kwargs.get("is_split_into_words"):
            text = self.convert_tokens_to_ids(list(text))
        return self(text, text_pair, add_special_tokens=add_special_tokens, **kwargs)["input_ids"]

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs) -> list[str]:
        """Text → tokens as strings; see `convert_ids_to_tokens`."""
        return self.convert_ids_to_tokens(self.encode(text, pair, add_special_tokens=add_special_tokens, **kwargs))

    def __call__(
        self,
        text=None,
        text_pair=None,
        text_target=None,
        text_pair_target=None,
        *,
        max_target_length: int | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ) -> BatchEncoding:
        """One text, or a list of texts or of pairs of texts → `input_ids` and `attention_mask`; ids stand for themselves.

        Arguments are the library's, and `return_offsets_mapping=True` works here: the character range of every token.
        `control_texts`, one `chat_kimi.ControlText` per text, says which of its control tokens are read as such.

        Raises:
            TypeError: an input is neither text nor ids; names its index in the batch.
        """
        kwargs = {**(tokenizer_kwargs or {}), **kwargs}
        taken = {key: kwargs[key] for key in ("pad_to_multiple_of", "verbose") if key in kwargs}
        padding, truncation, max_length, kwargs = self._get_padding_truncation_strategies(**kwargs)
        kwargs.update(taken, padding_strategy=padding, truncation_strategy=truncation)
        if text_target is None:
            return self._encode_plus(text, text_pair, max_length=max_length, **kwargs)
        target = self._encode_plus(text_target, text_pair_target, max_length=max_target_length or max_length, **kwargs)
        if text is None:
            return target
        encoded = self._encode_plus(text, text_pair, max_length=max_length, **kwargs)
        encoded["labels"] = target["input_ids"]
        return encoded

    def _batch_encode_plus(self, batch_text_or_text_pairs, **kwargs) -> BatchEncoding:
        # Version 4's `batch_encode_plus` ends here; version 5 has one method for one text and for many.
        return self._encode_plus(list(batch_text_or_text_pairs), **kwargs)

    def _encode_plus(
        self,
        text,
        text_pair=None,
        add_special_tokens: bool = True,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors=None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        split_special_tokens: bool | None = None,
        allow_special_tokens: bool = True,
        control_texts: list[ControlText | None] | None = None,
        **kwargs,
    ) -> BatchEncoding:
        if kwargs:
            logger.warning(f"Keyword arguments {kwargs} not recognized.")
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        plain = split_special_tokens or not allow_special_tokens
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names

        def ids_of(given, name, control=None):
            """Ids of one sequence, and its offsets where asked for and known."""
            if isinstance(given, str):
                if return_offsets_mapping:
                    return self._text_ids.with_offsets(given, plain, control)
                return self._text_ids(given, plain, control), None
            if isinstance(given, (list, tuple)):
                if all(isinstance(item, int) for item in given):
                    return list(given), None
                if is_split_into_words and all(isinstance(item, str) for item in given):
                    return [index for word in given for index in self._text_ids(word, plain, control)], None
            allowed = "a list of strings" if is_split_into_words else "a string, a pair of strings in a batch,"
            raise TypeError(f"{name} must be {allowed} or a list of ids, not {describe(given)}")

        sequences, is_batch = _as_batch(text, text_pair, is_split_into_words)
        columns: dict[str, list] = {"input_ids": []}
        all_offsets = []
        for index, (first, second) in enumerate(sequences):
            where = f"[{index}]" if is_batch else ""
            first_ids, offsets = ids_of(first, f"text{where}", control_texts[index] if control_texts else None)
            second_ids = None if second is None else ids_of(second, f"text_pair{where}")[0]
            if return_offsets_mapping and (offsets is None or second is not None):
                raise NotImplementedError("return_offsets_mapping is there for single texts, not for pairs, words or ids")
            row = self.prepare_for_model(
                first_ids,
                second_ids,
                add_special_tokens=add_special_tokens,
                padding=PaddingStrategy.DO_NOT_PAD.value,  # the batch is padded below
                truncation=truncation_strategy.value,
                max_length=max_length,
                stride=stride,
                return_attention_mask=False,
                return_token_type_ids=return_token_type_ids,
                return_overflowing_tokens=return_overflowing_tokens,
                return_special_tokens_mask=return_special_tokens_mask,
                return_length=return_length,
                verbose=verbose,
            )
            if return_overflowing_tokens:  # version 5 leaves these out of rows that were not cut
                row.setdefault("overflowing_tokens", [])
                row.setdefault("num_truncated_tokens", 0)
            for key, value in row.items():
                columns.setdefault(key, []).append(value)
            if return_offsets_mapping:
                kept = len(row["input_ids"])
                all_offsets.append(offsets[:kept] if self.truncation_side == "right" else offsets[len(offsets) - kept :])

        padded = self.pad(
            columns,
            padding=padding_strategy.value,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
            verbose=verbose,
        )
        data = dict(padded)
        if return_offsets_mapping:
            on_left = (padding_side or self.padding_side) == "left"
            missing = [[(0, 0)] * (len(row) - len(known)) for row, known in zip(data["input_ids"], all_offsets)]
            data["offset_mapping"] = [m + o if on_left else o + m for m, o in zip(missing, all_offsets)]
        if return_length and not is_batch:
            data["length"] = [len(row) for row in data["input_ids"]]  # of one text, the library counts the padding too
        if return_tensors is not None:
            for key in ("overflowing_tokens", "num_truncated_tokens"):  # rows of unequal length make no tensor
                data.pop(key, None)
            data = integers(data)
        elif not is_batch:
            data = {key: value[0] for key, value in data.items()}
        return BatchEncoding(data, tensor_type=return_tensors)

    # ---- Ids → text ----

    def decode(self, token_ids, skip_special_tokens: bool = False, clean_up_tokenization_spaces=None, **kwargs):
        """Ids → text; a batch of ids → a list of texts. Bytes that are not UTF-8 become U+FFFD.

        Args:
            token_ids: one id, a sequence of ids or a sequence of sequences: int, list, NumPy array or torch tensor.

        Raises:
            ValueError: an id is outside the vocabulary; names its position.
        """
        token_ids = _as_python(token_ids)
        if isinstance(token_ids, list) and token_ids and isinstance(_as_python(token_ids[0]), list):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces, **kwargs) for row in token_ids]
        return self._decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces)

    def batch_decode(self, sequences, skip_special_tokens: bool = False, clean_up_tokenization_spaces=None, **kwargs):
        """A sequence of sequences of ids → a list of texts; a flat sequence is one text in a list."""
        text = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces, **kwargs)
        if isinstance(text, str):
            return [text] if len(sequences) else []
        return text

    def _decode(self, token_ids, skip_special_tokens: bool = False, clean_up_tokenization_spaces=None, **kwargs) -> str:
        ids = token_ids if isinstance(token_ids, list) else [token_ids]
        try:
            data = self._spelling().join(ids, self._special_ids() if skip_special_tokens else frozenset())
        except (IndexError, OverflowError, TypeError, ValueError) as error:
            for position, index in enumerate(ids):
                if not isinstance(index, (int, np.integer)):
                    raise TypeError(f"token_ids[{position}] must be an integer, not {describe(index)}") from error
                if not 0 <= index < self.vocab_size and index not in self._late_tokens:
                    message = f"token_ids[{position}] is {index}, outside the vocabulary, 0 to {len(self) - 1}"
                    raise ValueError(message) from error
            raise
        text = data.decode("utf-8", errors="replace")
        clean = self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean else text

    def _spelling(self) -> TokenBytes:
        if self._token_bytes is None:  # made when first needed, as it takes some milliseconds
            late = [self._late_tokens.get(index) for index in range(self.vocab_size, max(self._late_tokens, default=0) + 1)]
            names = [token and token.encode() for token in [*self._encoding._special_tokens, *late]]
            self._token_bytes = TokenBytes([*self._encoding._mergeable_ranks, *names])
        return self._token_bytes

    # ---- Replies ----

    def parse_response(self, response, schema=None, *, prefix=None, tools=None, thinking: bool | None = None):
        """What the model said, without the prompt → `reasoning`, `content` and `tool_calls`: see `response_kimi.parse_response`.

        Args:
            response: text, bytes or ids; several of them (a list, an array of two axes) give a list.
            schema: as in the library, whose own parser then does it. (A bool is `thinking`.)
            prefix: the prompt, as text or ids, or one for each reply: it says whether thinking was open.
            tools: not needed, as arguments stay as they were written.
            thinking: as in `apply_chat_template`; by `prefix` where that is given, else true.

        Raises:
            TypeError, ValueError: as `response_kimi.parse_response`; replies and prompts of different numbers.
        """
        if isinstance(schema, bool):
            schema, thinking = None, schema
        if schema is not None:
            return super().parse_response(response, schema, prefix=prefix, tools=tools)
        replies, prefix = _as_python(response), _as_python(prefix)
        if isinstance(replies, list) and replies and not isinstance(_as_python(replies[0]), int):
            several = isinstance(prefix, list) and prefix and not isinstance(_as_python(prefix[0]), int)
            prefixes = prefix if several else [prefix] * len(replies)
            if len(prefixes) != len(replies):
                raise ValueError(f"there are {len(replies)} replies and {len(prefixes)} prefixes")
            return [self.parse_response(reply, prefix=one, thinking=thinking) for reply, one in zip(replies, prefixes)]
        if thinking is None and prefix:
            opened = (prefix if isinstance(prefix, str) else self.decode(prefix)).rpartition("<|im_middle|>")[2]
            thinking = "<think>" in opened and "</think>" not in opened
        return parse_response(replies, True if thinking is None else thinking, self)

    # ---- Files ----

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write `tiktoken.model`, the bytes it was read from, into an existing folder; return its path."""
        name = (f"{filename_prefix}-" if filename_prefix else "") + VOCAB_FILES_NAMES["vocab_file"]
        path = os.path.join(save_directory, name)
        write_ranks(self._encoding._mergeable_ranks, path)
        return (path,)

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        # Both versions have written tokenizer_config.json by now. Version 5 names the list of special tokens so that
        # version 4, and engines built on it, fail on it; put it in the published form, which all read.
        for path in file_names:
            if os.path.basename(path).endswith("tokenizer_config.json"):
                with open(path, encoding="utf-8") as file:
                    config = json.load(file)
                listed = config.get("extra_special_tokens")
                if isinstance(listed, list):
                    config["additional_special_tokens"] = listed
                    config["extra_special_tokens"] = {}
                for key in ("backend", "is_local", "local_files_only"):
                    config.pop(key, None)
                with open(path, "w", encoding="utf-8") as file:
                    file.write(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        return super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)

    # ---- Chats ----

    def apply_chat_template(
        self,
        conversation,
        tools: list | None = None,
        documents: list[dict] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        *,
        padding: bool | str | PaddingStrategy = False,
        truncation: bool | str | TruncationStrategy = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool | None = None,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
        thinking: bool | None = True,
        preserve_thinking: bool = False,
        **kwargs,
    ):
        """Messages → ids, or text with `tokenize=False`. The other arguments and the result are the library's.

        Only the template speaks control: special tokens typed in a message, a name, a tool's result or declaration, or
        another variable of the template (`kwargs`) become ids of ordinary text. The text of a chat is as published.

        Args:
            conversation: messages in OpenAI's form, or a list of such lists.
            tools: dicts in OpenAI's form, or Python functions with type hints and docstring.
            add_generation_prompt: end with the opening of a reply. Default: yes, unless `continue_final_message` or
                `return_assistant_tokens_mask` is set.
            return_assistant_tokens_mask: also return `assistant_masks`, 1 on the tokens that are the assistant's own words
                (reasoning, content, calls and the closing `<|im_end|>`), 0 elsewhere; implies `return_dict`.
            sanitize_control_tokens: False restores the published behaviour: special tokens typed anywhere become their
                ids. For trusted messages, such as replies put back with their markers.
            thinking: False asks for an answer without thinking and shows none of the earlier thinking.
            preserve_thinking: show the thinking of all earlier turns, not only of those after the last finished answer.

        Raises:
            TypeError: a flag is no bool, `messages[i]` no dict or its role no string, a tool neither dict nor function.
            ValueError: there is no message or no template, or it confuses its control tokens with the messages' text.
        """
        if return_assistant_tokens_mask and not (tokenize and return_dict in (None, True)):
            raise ValueError("return_assistant_tokens_mask=True needs tokenize=True and return_dict=True")
        chats = render_chats(
            self,
            conversation,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=tokenize,
            sanitize_control_tokens=sanitize_control_tokens,
            want_spoken=return_assistant_tokens_mask,
            thinking=thinking,
            preserve_thinking=preserve_thinking,
            **kwargs,
        )
        texts, is_batch = [chat.text for chat in chats], is_batch_of_chats(conversation)
        if not tokenize:
            return texts if is_batch else texts[0]
        options = {"padding": padding, "truncation": truncation, "max_length": max_length, "add_special_tokens": False}
        options |= {"return_tensors": return_tensors, **(tokenizer_kwargs or {})}
        wants_offsets = options.get("return_offsets_mapping")
        if return_assistant_tokens_mask:
            return_tensors = options["return_tensors"]
            options |= {"return_offsets_mapping": True, "return_tensors": None}
        encoded = self(texts, control_texts=[chat.control for chat in chats], **options)
        if return_assistant_tokens_mask:
            offsets = encoded["offset_mapping"] if wants_offsets else encoded.pop("offset_mapping")
            encoded["assistant_masks"] = [chat.spoken_mask(row) for chat, row in zip(chats, offsets)]
            encoded = BatchEncoding(dict(encoded), tensor_type=return_tensors)
        if not is_batch and not (return_tensors or options["return_tensors"]):
            encoded = BatchEncoding({key: value[0] for key, value in encoded.items()})
        if return_dict is None:
            return_dict = return_assistant_tokens_mask or _RETURNS_DICT
        return encoded if return_dict else encoded["input_ids"]


def _as_batch(text, text_pair, is_split_into_words: bool) -> tuple[list[tuple], bool]:
    """The library's rules for what is one input and what a batch → (list of (first, second or None), whether a batch)."""
    is_list = isinstance(text, (list, tuple))
    if is_split_into_words:
        is_batch = is_list and len(text) > 0 and isinstance(text[0], (list, tuple))
    else:
        is_batch = is_list and not (text and isinstance(text[0], int))
    if not is_batch:
        return [(text, text_pair)], False
    if text_pair is not None:
        if not isinstance(text_pair, (list, tuple)):
            raise TypeError(f"text is a batch, so text_pair must be a list too, not {describe(text_pair)}")
        if len(text) != len(text_pair):
            raise ValueError(f"text has {len(text)} items, text_pair has {len(text_pair)}; they must be as many")
        return list(zip(text, text_pair)), True
    part = (list, tuple) if is_split_into_words else (str, list, tuple)
    return [
        tuple(item)
        if isinstance(item, tuple if is_split_into_words else (list, tuple))
        and len(item) == 2
        and all(isinstance(half, part) for half in item)
        else (item, None)
        for item in text
    ], True


def integers(columns: dict[str, list]) -> dict[str, Any]:
    """Rows as arrays of int64: from there the way to a tensor is shorter, and an empty row stays one of integers. Rows of unequal length
    are left to the library, whose error says what to do."""
    if len({len(row) for row in columns["input_ids"]}) > 1:
        return columns
    return {key: np.asarray(rows, dtype=np.int64) for key, rows in columns.items()}


def _as_python(ids):
    """Arrays and tensors → lists and ints; tuples and ranges → lists."""
    if hasattr(ids, "tolist"):
        return ids.tolist()
    return list(ids) if isinstance(ids, (tuple, range)) else ids
