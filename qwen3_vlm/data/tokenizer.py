"""The tokenizer as the data path sees it: special tokens by name, everything else as plain text.

Two encoders live here on purpose. Special tokens are looked up by name and placed by `chat.py`; words of users and data
sets go through a copy of the tokenizer that knows no added token, so that "<|im_end|>" typed by a user is a few
ordinary tokens and can neither end a turn nor stand for an image. (Hugging Face's `split_special_tokens` is not enough:
"<think>" and "<tool_call>" are added tokens of Qwen3 that are not special.)
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qwen3_vlm.errors import ConfigError
from qwen3_vlm.modality.base import Modality

IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class PlaceholderIds:
    """Token ids that stand for one item: start, k x pad, end."""

    start: int
    pad: int
    end: int


class ChatTokenizer:
    """A fast Hugging Face tokenizer with the ids that the prompt grammar needs.

    Args:
        tokenizer: the loaded tokenizer.
        modalities: the run's modalities; their placeholder tokens are looked up.

    Raises:
        ConfigError: a token that the grammar needs is missing, or plain text cannot be kept apart from added tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, modalities: Mapping[str, Modality]):
        self.hf = tokenizer
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        needed = [IM_START, IM_END, PAD]
        for modality in modalities.values():
            needed += [modality.placeholder.start, modality.placeholder.pad, modality.placeholder.end]
        missing = [token for token in needed if token not in added]
        if missing:
            raise ConfigError(
                f"the tokenizer {tokenizer.name_or_path!r} lacks {', '.join(missing)} as added tokens; "
                "use a Qwen3 tokenizer, or one that carries these tokens"
            )
        self.im_start_id = added[IM_START]
        self.im_end_id = added[IM_END]
        self.pad_id = added[PAD]
        self.placeholder_ids = {
            name: PlaceholderIds(start=added[p.start], pad=added[p.pad], end=added[p.end])
            for name, p in ((name, modality.placeholder) for name, modality in modalities.items())
        }
        self._plain = _without_added_tokens(tokenizer.backend_tokenizer)
        for text in added:
            leaked = set(self.encode(text)) & set(added.values())
            if leaked or self.decode(self.encode(text)) != text:
                raise ConfigError(
                    f"the tokenizer {tokenizer.name_or_path!r} cannot encode {text!r} as plain text "
                    f"(got ids {self.encode(text)}); a byte-level BPE whose added tokens are outside its merges can"
                )

    @classmethod
    def from_folder(cls, folder: str | Path, modalities: Mapping[str, Modality]) -> "ChatTokenizer":
        """Load a tokenizer folder (tokenizer.json and its config); nothing is downloaded and no code of it runs.

        Raises:
            ConfigError: the folder has no fast tokenizer, or the tokenizer does not fit the grammar.
        """
        if not (Path(folder) / "tokenizer.json").is_file():
            raise ConfigError(f"{folder} has no tokenizer.json: expected a folder with a fast Hugging Face tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise ConfigError(f"{folder} loads as {type(tokenizer).__name__}, which is not a fast tokenizer")
        return cls(tokenizer, modalities)

    def encode(self, text: str) -> list[int]:
        """Encode words; no special or added token can come out, whatever the text says."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids, special tokens by name unless skipped; spaces are left as they are."""
        return self.hf.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    @property
    def fingerprint(self) -> str:
        """Hash of vocabulary, merges and rules: equal fingerprints encode equally."""
        return hashlib.sha256(self.hf.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def _without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    spec = json.loads(tokenizer.to_str())
    spec |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(spec))
