"""Messages and images -> what the model takes, for transformers 4.57 and 5.x; needs no torchvision.

A turn is plain ChatML, `<|im_start|>{role}\\n{content}<|im_end|>\\n`, a system turn only if given; an image is
`<|vision_start|>` + N x `<|image_pad|>` + `<|vision_end|>`. `apply_chat_template(..., tokenize=True)` places special
tokens itself and encodes words with a tokenizer that knows no added token, so that "<|im_end|>" typed by a user is a
few ordinary tokens. `processor(text=...)` takes rendered text instead and reads special tokens in it as such.

Pieces, the form between the two: a str is words, a list is token ids; neighbouring words are encoded together, and an
empty list keeps them apart.
"""

import base64
import binascii
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import Image, ImageOps, UnidentifiedImageError
from tokenizers import Tokenizer
from transformers import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_transforms import to_pil_image
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessorMixin

ROLES = ("system", "user", "assistant")
SENTINEL = "<image>"
"""Marks an image in a message whose content is a plain string."""
IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
SPECIAL = re.compile(
    "|".join(
        (
            f"{re.escape(VISION_START)}(?:{re.escape(IMAGE_PAD)})+{re.escape(VISION_END)}",
            f"{re.escape(IM_START)}assistant\n",
            *map(re.escape, (IM_START, IM_END, END_OF_TEXT, VISION_START, IMAGE_PAD, VISION_END)),
        )
    )
)
Piece = str | list[int]


class Qwen3SiglipImageProcessor(ImageProcessingMixin):
    """Images -> normalised pixels of the tower's square, as in training.

    Upright by EXIF -> RGB (alpha is dropped; 16-bit grey is scaled, where Pillow's conversion saturates) -> resized by
    torch, with antialias -> (x - 255 mean) / (255 std) in FP32. The first frame of an animation is taken.

    Args:
        size: {"height": pixels, "width": pixels}.
        resample: Pillow's code, 3 bicubic or 2 bilinear.
        image_mean, image_std: a channel, of pixels in [0, 1].
        kwargs: the fixed steps as preprocessor_config.json names them (do_resize, rescale_factor, ...).
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (transformers' form)
    valid_kwargs = ImagesKwargs

    def __init__(
        self,
        size: dict[str, int] | None = None,
        resample: int = 3,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.size = size or {"height": 384, "width": 384}
        self.resample = resample
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def __call__(self, images: Any, return_tensors: str | None = None) -> BatchFeature:
        """One image or a list of them (Pillow, array, path, URL) -> pixel_values [i, 3, H, W] FP32."""
        images = images if isinstance(images, list | tuple) else [images]
        pixels = [self.normalize(self.pixels(image)) for image in images]
        return BatchFeature({"pixel_values": np.stack(pixels)}, tensor_type=return_tensors)

    preprocess = __call__

    def pixels(self, image: Any) -> np.ndarray:
        """One image -> [3, H, W] uint8."""
        pixels = torch.from_numpy(np.array(upright_rgb(image))).permute(2, 0, 1)[None]
        mode = Image.Resampling(self.resample).name.lower()
        size = (self.size["height"], self.size["width"])
        return torch.nn.functional.interpolate(pixels, size, mode=mode, antialias=True)[0].numpy()

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """[3, H, W] uint8 -> FP32, by the same operations as in training."""
        mean, std = (
            np.asarray(x, np.float32)[:, None, None] * np.float32(255) for x in (self.image_mean, self.image_std)
        )
        return (pixels.astype(np.float32) - mean) / std


def upright_rgb(image: Any) -> Image.Image:
    """Load an image if it is a path or URL; turn it upright and make it RGB."""
    if isinstance(image, str) and not os.path.isfile(image):  # noqa: PTH113 (a URL or base64 text is no path)
        try:
            with Image.open(io.BytesIO(_fetch(image))) as opened:
                return upright_rgb(opened)
        except (binascii.Error, UnidentifiedImageError) as e:
            raise ValueError(f"{image[:80]!r} is no path, URL, data URL or base64 text of an image") from e
    if isinstance(image, str | os.PathLike):
        with Image.open(image) as opened:
            return upright_rgb(opened)
    if not isinstance(image, Image.Image):
        image = to_pil_image(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _fetch(source: str) -> bytes:
    """Bytes of a URL, data URL or base64 text; transformers' load_image saturates 16-bit grey before we could scale."""
    if source.startswith(("http://", "https://")):
        response = get_session().get(source)
        response.raise_for_status()
        return response.content
    return base64.decodebytes(source.partition(",")[2].encode() if source.startswith("data:") else source.encode())


class Qwen3SiglipProcessor(ProcessorMixin):
    """Tokenizer and image processor of one model.

    Args:
        image_processor: `Qwen3SiglipImageProcessor`.
        tokenizer: a fast tokenizer that has the special tokens of the grammar.
        chat_template: chat_template.jinja, for rendered text.
        num_image_tokens: N.

    Raises:
        ValueError: the tokenizer lacks a special token.
    """

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012 (transformers' form)
    if not hasattr(ProcessorMixin, "get_attributes"):  # 4.57 asks for the classes; 5.x warns that it does not
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 64,
        **kwargs: Any,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.num_image_tokens = num_image_tokens
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        names = (IM_START, IM_END, END_OF_TEXT, VISION_START, IMAGE_PAD, VISION_END)
        missing = [name for name in names if name not in added]
        if missing:
            raise ValueError(f"the tokenizer lacks {', '.join(missing)} as added tokens: use the exported folder's own")
        self._ids = {name: added[name] for name in names}
        self.image_token = IMAGE_PAD
        self.image_token_id = added[IMAGE_PAD]

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer without added tokens: whatever the words say, no special token comes out."""
        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        spec |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(spec))

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        images: Any = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Conversations -> text, token ids or model inputs.

        Args:
            conversation: messages {"role", "content"}, or a list of such lists. Content is a list of {"type": "text",
                "text"} and {"type": "image", "image" | "url" | "path": picture or where it is}; or a string, in which
                every `<image>` is an image of `images`.
            chat_template: another template than ours; its text is then encoded as `__call__` does.
            add_generation_prompt: end with the assistant's header.
            continue_final_message: leave the last turn open.
            tokenize: encode; otherwise return the text.
            return_dict: return input_ids, attention_mask and pixel_values, not input_ids alone.
            return_tensors: "pt" or "np"; lists otherwise.
            images: those that the messages do not bring themselves, in order; one list for all conversations.
            processor_kwargs: as `__call__` takes them.
            kwargs: the same, with our template; variables of another template, or of text that is not encoded.

        Returns:
            Text (or a list of texts), or token ids, or a BatchFeature.

        Raises:
            ValueError: no turn, an unknown role or part, or images and their places differ in number.
        """
        if not conversation:
            raise ValueError("the conversation has no turn")
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt opens a new turn, continue_final_message keeps the last: choose one"
            )
        rendered = None
        if not tokenize or chat_template is not None:
            rendered = super().apply_chat_template(
                conversation,
                chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                num_image_tokens=self.num_image_tokens,
                **kwargs,
            )
            kwargs = {}
        if not tokenize:
            return rendered
        conversations = conversation if isinstance(conversation[0], list | tuple) else [conversation]
        rest = iter([] if images is None else images if isinstance(images, list | tuple) else [images])
        media: list[Any] = []
        prompts = []
        for messages in conversations:
            pieces = self._chat_pieces(messages, rest, media)
            if continue_final_message:
                del pieces[-2:]  # <|im_end|> and the line break
            if add_generation_prompt:
                pieces += [[self._ids[IM_START]], "assistant\n"]
            prompts.append(self._encode(pieces))
        unused = len(list(rest))
        if unused:
            raise ValueError(f"images= holds {unused} more than the conversations have places for")
        given = {name: value for name, value in kwargs.items() if value is not None}  # tools=None and the like
        kwargs = {"return_tensors": return_tensors, **(processor_kwargs or {}), **given}
        inputs = self(media, rendered, **kwargs) if rendered is not None else self._collate(prompts, media, **kwargs)
        return inputs if return_dict else inputs["input_ids"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        return_text_replacement_offsets: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Rendered prompts and their images -> model inputs.

        Args:
            images: one image, a list for all prompts in order, or a list of lists, one a prompt.
            text: prompts with special tokens in them; an image is `<|image_pad|>`, alone or in `<|vision_start|>` and
                `<|vision_end|>`, or N of them in there. Without text, pixels alone are returned.
            return_text_replacement_offsets: add text_replacement_offsets, where each image stands in the text and what
                it becomes, as transformers 5's processors report it (serving engines ask).
            kwargs: return_tensors ("pt", "np"), padding (True, False, "max_length"), padding_side, max_length,
                truncation, pad_to_multiple_of, return_mm_token_type_ids; the same in text_kwargs or common_kwargs.

        Returns:
            input_ids and attention_mask [b, s]; pixel_values [i, 3, H, W] if there are images.

        Raises:
            ValueError: images and their places differ in number, or truncation would cut an image.
        """
        nested = isinstance(images, list | tuple) and any(isinstance(x, list | tuple) for x in images)
        per_prompt = [list(x) for x in images] if nested else None
        flat = [x for group in per_prompt for x in group] if per_prompt is not None else images
        flat = [] if flat is None else list(flat) if isinstance(flat, list | tuple) else [flat]
        if text is None:
            return self._collate(None, flat, **kwargs)
        texts = [text] if isinstance(text, str) else text
        prompts = [self._encode(self._text_pieces(prompt)) for prompt in texts]
        counts = [ids.count(self.image_token_id) // self.num_image_tokens for ids in prompts]
        given = [len(group) for group in per_prompt] if per_prompt is not None else None
        if (given or counts) != counts or len(flat) != sum(counts):
            raise ValueError(
                f"the prompts have places for {counts} images, got {given or len(flat)}: an image is "
                f"{VISION_START}{IMAGE_PAD}{VISION_END} in text, or use apply_chat_template"
            )
        inputs = self._collate(prompts, flat, **kwargs)
        if return_text_replacement_offsets:
            inputs["text_replacement_offsets"] = [self._replacements(prompt) for prompt in texts]
        return inputs

    def _chat_pieces(self, messages: Sequence[Any], rest: Iterator[Any], media: list[Any]) -> list[Piece]:
        """Turns -> pieces; appends the images to `media`."""
        pieces: list[Piece] = []
        for message in messages:
            role, content = message["role"], message["content"]
            if role not in ROLES:
                raise ValueError(f"unknown role {role!r}, expected one of {', '.join(ROLES)}")
            pieces += [[self._ids[IM_START]], f"{role}\n"]
            if role == "assistant":
                pieces.append([])  # generation starts between header and content
            for part in _parts(content):
                if isinstance(part, str):
                    pieces.append(part)
                    continue
                image = part.get("image", part.get("url", part.get("path", part.get("base64", part.get("image_url")))))
                image = image["url"] if isinstance(image, dict) else image
                image = next(rest, None) if image is None else image
                if image is None:
                    raise ValueError(
                        f"image {len(media) + 1} of the conversations is missing: put it into the message as "
                        '{"type": "image", "image": ...}, or into images='
                    )
                media.append(image)
                pieces.append(self._image_ids)
            pieces += [[self._ids[IM_END]], "\n"]
        return pieces

    def _text_pieces(self, text: str) -> Iterator[Piece]:
        """Rendered text -> pieces."""
        end = 0
        for match in SPECIAL.finditer(text):
            yield text[end : match.start()]
            end = match.end()
            token, count = match.group(), match.group().count(IMAGE_PAD)
            if token in self._ids:
                yield [self._ids[token]] * (self.num_image_tokens if token == IMAGE_PAD else 1)
            elif count == 0:  # an assistant's header, kept apart from what follows
                yield from ([self._ids[IM_START]], "assistant\n", [])
            elif count in (1, self.num_image_tokens):
                yield self._image_ids
            else:
                raise ValueError(f"an image has {count} {IMAGE_PAD} in the text, expected 1 or {self.num_image_tokens}")
        yield text[end:]

    def _replacements(self, text: str) -> list[dict[str, Any]]:
        """Placeholders of a rendered text: their span, and the text and span of what they become."""
        replacement = IMAGE_PAD * self.num_image_tokens
        found, shift = [], 0
        for match in SPECIAL.finditer(text):
            if IMAGE_PAD in match.group():
                start = text.index(IMAGE_PAD, match.start())
                end = start + match.group().count(IMAGE_PAD) * len(IMAGE_PAD)
                new_span = (start + shift, start + shift + len(replacement))
                spans = {"span": (start, end), "new_span": new_span, "text": text[start:end]}
                found.append({"type": "image", **spans, "replacement": replacement})
                shift += len(replacement) - (end - start)
        return found

    @property
    def _image_ids(self) -> list[int]:
        pads = [self._ids[IMAGE_PAD]] * self.num_image_tokens
        return [self._ids[VISION_START], *pads, self._ids[VISION_END]]

    def _encode(self, pieces: Iterable[Piece]) -> list[int]:
        ids: list[int] = []
        words = ""
        for piece in [*pieces, []]:
            if isinstance(piece, str):
                words += piece
                continue
            ids += self._plain.encode(words, add_special_tokens=False).ids
            ids += piece
            words = ""
        return ids

    def _collate(
        self, prompts: list[list[int]] | None, images: list[Any], *, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Token ids of prompts, and images -> model inputs."""
        for name in ("text_kwargs", "images_kwargs", "common_kwargs"):
            kwargs |= kwargs.pop(name, None) or {}
        return_tensors = kwargs.pop("return_tensors", return_tensors)
        data = self._pad(prompts, **kwargs) if prompts is not None else {}
        if images:
            data |= self.image_processor(images)
        return BatchFeature(data, tensor_type=return_tensors)

    def _pad(
        self,
        prompts: list[list[int]],
        *,
        padding: bool | str = True,
        padding_side: str | None = None,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_mm_token_type_ids: bool = False,
        add_special_tokens: bool = False,
    ) -> dict[str, list[list[int]]]:
        """Rows of one length; `add_special_tokens` means nothing here, since prompts hold their own."""
        if truncation and max_length is not None:
            if any(self.image_token_id in ids[max_length:] for ids in prompts):
                raise ValueError(f"truncation to {max_length} tokens would cut an image: raise max_length")
            prompts = [ids[:max_length] for ids in prompts]
        width = max(map(len, prompts))
        if padding == "max_length" and max_length is not None:
            width = max(width, max_length)
        if pad_to_multiple_of:
            width += -width % pad_to_multiple_of
        pads = padding not in (False, "do_not_pad")
        left = (padding_side or self.tokenizer.padding_side) == "left"

        def padded(row: list[int], value: int) -> list[int]:
            filling = [value] * (width - len(row) if pads else 0)
            return filling + row if left else row + filling

        rows = {
            "input_ids": [padded(ids, self._ids[END_OF_TEXT]) for ids in prompts],
            "attention_mask": [padded([1] * len(ids), 0) for ids in prompts],
        }
        if return_mm_token_type_ids:
            rows["mm_token_type_ids"] = [padded([int(i == self.image_token_id) for i in ids], 0) for ids in prompts]
        return rows

    def _get_num_multimodal_tokens(self, image_sizes: Sequence[Any] | None = None, **kwargs: Any) -> MultiModalData:
        """Tokens and pixel_values rows of images of these sizes (serving engines ask)."""
        count = len(image_sizes or ())
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    @property
    def model_input_names(self) -> list[str]:
        """Keys of what this makes."""
        return ["input_ids", "attention_mask", "pixel_values"]


def _parts(content: str | Sequence[dict[str, Any]]) -> Iterator[str | dict[str, Any]]:
    """Content -> words (str) and images (dict)."""
    if isinstance(content, str):
        for n, words in enumerate(content.split(SENTINEL)):
            if n:
                yield {}
            yield words
        return
    for part in content:
        if part["type"] == "text":
            yield part["text"]
        elif part["type"] in ("image", "image_url"):
            yield part
        else:
            raise ValueError(f"unknown content type {part['type']!r}, expected text or image")
