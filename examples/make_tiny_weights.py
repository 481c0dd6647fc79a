"""Make the demo's stand-ins for the public weights: a tiny Qwen3 and a tiny SigLIP as Hugging Face folders.

    python examples/make_tiny_weights.py --out examples/tiny_weights

They stand for Qwen3-8B-Base and SigLIP2 so400m on a machine without a GPU or a network: same classes, same file
formats, same special tokens, but they know only the world of `examples/demo/scenes.py`. The order of work:

1. Tokenizer: byte-level BPE with Qwen3's pre-tokenisation and added tokens, merges learned from the demo's texts.
2. Tower: from pictures of 1 to 3 objects, supervised cell by cell (which colour, which shape, large or small, centre
   here?) through linear heads on the patches and on the 3 x 3 average-pooled cells. The heads are thrown away.
3. Decoder: from text (conversations about objects that are listed in words) and, at the same time, from captions of
   pictures, read through a throw-away linear connector on the frozen tower's pooled cells.

Neither model ever sees an image together with a question about it, other than the request for a description.
The pictures come from `Split.PRETRAIN`: no training or held-out scene of the demo is among them.

Figures of the weights in `examples/tiny_weights` (this command, seed 0, one thread; 43 minutes on two cores that had
other work), on 999 pictures and 999 conversations that were not trained on:

- Tower, 0.49 M parameters: of the 3 x 3 cells that hold an object's centre, 0.959 right in colour, 0.938 in shape and
  0.925 in size.
- Decoder, 1.25 M parameters: every token right in 0.636 of the captions (1 to 3 objects; two fifths with size and
  place) and in 0.286 of the text conversations (1 to 5 answers each).

Another processor or thread count sums in another order, so its weights are not bit-equal to these.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo.scenes import (
    CAPTION_PROMPTS,
    COLORS,
    SHAPES,
    SIZE_BANDS,
    Scene,
    SceneObject,
    Split,
    join_words,
    render,
    row_rng,
    sample_scene,
    with_article,
)
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

IMAGE_SIZE = 72
PATCH_SIZE = 12
GRID = IMAGE_SIZE // PATCH_SIZE
CELLS = 3
"""The demo's 9 visual tokens start as the patch grid pooled to 3 x 3 cells: features must survive that average."""
MAX_OBJECTS = 3
NUM_PICTURES = 30_000
TOWER_STEPS = 8000
DECODER_STEPS = 5000

# Source: tokenizer.json of Qwen/Qwen3-8B.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# fmt: off
QWEN_SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]
QWEN_PLAIN_ADDED_TOKENS = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
]
# fmt: on
VOCAB_SIZE = 1024

DETAIL_PROMPTS = (
    "Describe the image in detail.",
    "Explain the visual content of the image in great detail.",
    "What do you see in the picture? Give all details.",
)


# ---------------------------------------------------------------------------------------------------------------------
# Texts: conversations about objects that are listed in words
# ---------------------------------------------------------------------------------------------------------------------

COUNT_WORDS = ("zero", "one", "two", "three", "four", "five", "six")
ORDINALS = ("first", "second", "third", "fourth", "fifth")
PLACES = {
    "top left": "in the top left",
    "top": "at the top",
    "top right": "in the top right",
    "left": "on the left",
    "middle": "in the middle",
    "right": "on the right",
    "bottom left": "in the bottom left",
    "bottom": "at the bottom",
    "bottom right": "in the bottom right",
}
SHORT_ANSWER = "Answer the question using a single word or phrase."

Turn = tuple[str, str]
"""A question and its answer."""
World = list[list[SceneObject]]
"""The objects of each picture that a conversation is about."""


def detailed_name(item: SceneObject) -> str:
    return f"{'large' if item.is_large else 'small'} {item.name}"


def detailed_caption(objects: list[SceneObject]) -> str:
    """Colours, shapes, sizes and places: "a small red circle in the top left and a large blue star on the right"."""
    return join_words([f"{with_article(detailed_name(item))} {PLACES[item.position]}" for item in objects])


def plain_caption(objects: list[SceneObject]) -> str:
    return join_words([with_article(item.name) for item in objects])


def plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def sample_world(rng: random.Random) -> World:
    """1 to 5 pictures, the more pictures the fewer objects in each. Few colours and shapes, so that things repeat."""
    num_images = rng.choice((1, 1, 2, 2, 2, 3, 3, 4, 5))
    max_objects = 3 if num_images <= 2 else 2 if num_images == 3 else 1
    colors = rng.sample(list(COLORS), rng.randint(2, 5))
    shapes = rng.sample(SHAPES, rng.randint(2, 4))
    world = []
    for _ in range(num_images):
        names = rng.sample([(c, s) for c in colors for s in shapes], rng.randint(1, max_objects))
        objects = [
            SceneObject(shape=s, color=c, x=rng.random(), y=rng.random(), size=rng.choice(SIZE_BANDS)[0], angle=0)
            for c, s in names
        ]
        world.append(sorted(objects, key=lambda item: item.x))
    if num_images > 1 and rng.random() < 0.2:  # otherwise equal pictures would be too rare to ask about
        world[-1] = world[0]
    return world


def describe_world(rng: random.Random, world: World) -> tuple[str, bool]:
    """The pictures in words, and whether the words include sizes and places."""
    detailed = rng.random() < (0.8 if len(world) == 1 else 0.3)
    captions = [detailed_caption(objects) if detailed else plain_caption(objects) for objects in world]
    if len(world) == 1:
        form = rng.choice(("The image shows {}.", "There is {} in the picture.", "Image: {}."))
        return form.format(captions[0]), detailed
    if rng.random() < 0.6:
        return " ".join(f"Image {i}: {text}." for i, text in enumerate(captions, 1)), detailed
    noun = rng.choice(("image", "picture"))
    return " ".join(f"The {ORDINALS[i]} {noun} shows {text}." for i, text in enumerate(captions)), detailed


def attribute_turn(rng: random.Random, objects: list[SceneObject], detailed: bool) -> Turn:
    """A question about one picture's objects."""
    item = rng.choice(objects)
    shape_is_unique = sum(o.shape == item.shape for o in objects) == 1
    color_is_unique = sum(o.color == item.color for o in objects) == 1
    turns = [
        (rng.choice(("How many objects are there?", "How many shapes are in the image?")), COUNT_WORDS[len(objects)]),
        (rng.choice(("What does the image show?", "Describe the image concisely.")), plain_caption(objects)),
        presence_turn(rng, objects),
        color_count_turn(rng, objects),
    ]
    if shape_is_unique:
        turns += [
            (rng.choice((f"What color is the {item.shape}?", f"What is the color of the {item.shape}?")), item.color)
        ] * 2
    if color_is_unique:
        asked = rng.choice((f"What shape is the {item.color} object?", f"What is the {item.color} thing?"))
        turns += [(asked, item.shape)] * 2
    if len(objects) == 1:
        turns += [("What color is the object?", item.color), ("What shape is the object?", item.shape)]
    else:
        index = rng.randrange(len(objects) - 1)
        left, right = objects[index], objects[index + 1]
        turns.append((f"What is to the right of the {left.name}?", with_article(right.name)))
        turns.append((f"What is to the left of the {right.name}?", with_article(left.name)))
        first, second = rng.sample((left, right), 2)
        is_left = "yes" if first is left else "no"
        turns.append((f"Is the {first.name} to the left of the {second.name}?", is_left))
    if detailed:
        noun = item.shape if shape_is_unique else item.name
        turns += [(rng.choice((f"Where is the {noun}?", f"Where in the image is the {noun}?")), item.position)] * 3
        turns.append((f"Is the {noun} large or small?", "large" if item.is_large else "small"))
        if sum(o.position == item.position for o in objects) == 1:
            turns.append((f"What is {PLACES[item.position]}?", with_article(item.name)))
        large = [o for o in objects if o.is_large]
        if len(large) == 1 and len(objects) > 1:
            turns.append((rng.choice(("Which object is the largest?", "What is the large object?")), large[0].name))
    return rng.choice(turns)


def presence_turn(rng: random.Random, objects: list[SceneObject]) -> Turn:
    item = rng.choice(objects)
    color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
    name = rng.choice((item.name, f"{item.color} {shape}", f"{color} {item.shape}"))
    return f"Is there {with_article(name)}?", "yes" if any(o.name == name for o in objects) else "no"


def color_count_turn(rng: random.Random, objects: list[SceneObject]) -> Turn:
    color = rng.choice((rng.choice(objects).color, rng.choice(list(COLORS))))
    number = COUNT_WORDS[sum(o.color == color for o in objects)]
    return f"How many {color} objects are there?", number


def across_turn(rng: random.Random, world: World) -> Turn:
    """A question that compares, counts, orders or refers over several pictures."""
    index = rng.randrange(len(world))
    item = rng.choice(world[index])
    word, holds = rng.choice(
        [(item.shape, lambda o: o.shape == item.shape)] * 2
        + [(f"{item.color} object", lambda o: o.color == item.color), (item.name, lambda o: o.name == item.name)]
    )
    shown_in = [i for i, objects in enumerate(world) if any(holds(o) for o in objects)]
    total = sum(holds(o) for objects in world for o in objects)
    this_image = rng.choice((f"image {index + 1}", f"the {ORDINALS[index]} image"))
    if index == len(world) - 1 and rng.random() < 0.5:
        this_image = "the last image"
    turns = [
        (rng.choice((f"What does {this_image} show?", f"Describe {this_image}.")), plain_caption(world[index])),
        (f"How many images show {with_article(word)}?", COUNT_WORDS[len(shown_in)]),
        (f"How many {plural(word)} are there in total?", COUNT_WORDS[total]),
        (f"How many objects are there in {this_image}?", COUNT_WORDS[len(world[index])]),
        ("How many objects are there in all images together?", COUNT_WORDS[sum(map(len, world))]),
        (f"Do all images show {with_article(word)}?", "yes" if len(shown_in) == len(world) else "no"),
        which_image_turn(rng, world),
        which_image_turn(rng, world),
        pair_turn(rng, world),
        pair_turn(rng, world),
    ]
    if len(shown_in) == 1:
        turns.append((f"Which image shows {with_article(word)}?", f"image {index + 1}"))
        if len(world[index]) == 1 and word == item.shape:
            turns += [(f"What color is the object in the image that shows {with_article(word)}?", item.color)] * 2
        if index + 1 < len(world):
            asked = rng.choice((f"What comes after the {word}?", f"What does the image after the {word} show?"))
            turns += [(asked, plain_caption(world[index + 1]))] * 2
        if index > 0:
            turns += [(f"What comes before the {word}?", plain_caption(world[index - 1]))] * 2
    if all(len(objects) == 1 for objects in world):
        kind, values = rng.choice((("colors", [o.color for (o,) in world]), ("shapes", [o.shape for (o,) in world])))
        asked = rng.choice((f"List the {kind} in order.", f"In what order do the {kind} appear?"))
        turns += [(asked, ", ".join(values))]
        turns += [(f"How many different {kind} are there?", COUNT_WORDS[len(set(values))])]
        turns += [(f"What {kind[:-1]} is the object in {this_image}?", values[index])] * 2
        odd = [i for i, value in enumerate(values) if values.count(value) == 1]
        if len(values) > 2 and len(odd) == 1 and len(set(values)) == 2:
            turns += [(f"Which image has a different {kind[:-1]} than the others?", f"image {odd[0] + 1}")] * 4
    return rng.choice(turns)


def which_image_turn(rng: random.Random, world: World) -> Turn:
    """A question like "Which image shows a star?", with "neither" (of two) and "none" (of more) among the answers."""
    name = rng.choice((rng.choice(SHAPES), rng.choice(world[rng.randrange(len(world))]).shape))
    shown_in = [i for i, objects in enumerate(world) if any(o.shape == name for o in objects)]
    if not shown_in:
        answer = "neither" if len(world) == 2 else "none"
    elif len(shown_in) == len(world):
        answer = "both" if len(world) == 2 else "all"
    else:
        answer = join_words([f"image {i + 1}" for i in shown_in])
    noun = with_article(name)
    return rng.choice((f"Which image shows {noun}?", f"Which images contain {noun}?")), answer


def pair_turn(rng: random.Random, world: World) -> Turn:
    """A comparison of two of the pictures."""
    i, j = sorted(rng.sample(range(len(world)), 2))
    both = "the two images" if len(world) == 2 else f"image {i + 1} and image {j + 1}"
    a, b = world[i], world[j]
    if len(a) == len(b) == 1:
        same_color, same_shape = a[0].color == b[0].color, a[0].shape == b[0].shape
        kind, same = rng.choice((("color", same_color), ("shape", same_shape)))
        if rng.random() < 0.5:
            asked = rng.choice((f"Is the {kind} the same in {both}?", f"Do {both} show the same {kind}?"))
            return asked, "yes" if same else "no"
        changes = []
        if not same_color:
            changes.append(f"the color changed from {a[0].color} to {b[0].color}")
        if not same_shape:
            changes.append(f"the shape changed from {a[0].shape} to {b[0].shape}")
        asked = rng.choice((f"What changed between {both}?", f"What is the difference between {both}?"))
        return asked, " and ".join(changes) or "nothing"
    more = "both the same" if len(a) == len(b) else f"image {i + 1}" if len(a) > len(b) else f"image {j + 1}"
    return f"Which image has more objects, image {i + 1} or image {j + 1}?", more


def sample_text_conversation(rng: random.Random) -> list[Turn]:
    """1 to 5 questions and answers; the first turn lists the objects in words, the others refer back to it."""
    world = sample_world(rng)
    description, detailed = describe_world(rng, world)
    turns: list[Turn] = []
    for _ in range(rng.randint(1, 5)):
        turn = attribute_turn(rng, world[0], detailed) if len(world) == 1 else across_turn(rng, world)
        if turn not in turns:
            turns.append(turn)
    question, answer = turns[0]
    if rng.random() < 0.2:
        question = f"{question}\n{SHORT_ANSWER}"
    text = f"{description}\n{question}" if rng.random() < 0.8 else f"{question}\n{description}"
    return [(text, answer), *turns[1:]]


def sample_caption_turn(rng: random.Random, objects: list[SceneObject], image_text: str) -> Turn:
    """A request for a description of a picture and the description; `image_text` stands where the picture does."""
    if rng.random() < 0.6:
        prompt, answer = rng.choice(CAPTION_PROMPTS), plain_caption(objects)
    else:
        prompt, answer = rng.choice(DETAIL_PROMPTS), detailed_caption(objects)
    return f"{image_text}\n{prompt}" if rng.random() < 0.5 else f"{prompt}\n{image_text}", answer


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def make_tokenizer(out_dir: Path, seed: int) -> PreTrainedTokenizerBase:
    """Learn the merges from the demo's texts, write the tokenizer's files and load them as a user would."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)

    rng = random.Random(seed)
    texts = ["user\n", "assistant\n", "system\n"] * 100
    texts += [text for _ in range(20_000) for turn in sample_text_conversation(rng) for text in turn]
    texts += [text for _ in range(5_000) for text in sample_caption_turn(rng, sample_world(rng)[0], "")]
    num_added = len(QWEN_SPECIAL_TOKENS) + len(QWEN_PLAIN_ADDED_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - num_added,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in QWEN_SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in QWEN_PLAIN_ADDED_TOKENS])

    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 131072,
        "add_prefix_space": False,
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": QWEN_SPECIAL_TOKENS[1:],
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    loaded = AutoTokenizer.from_pretrained(out_dir, trust_remote_code=False)
    words = [*COUNT_WORDS, *(f" {word}" for word in (*COLORS, *SHAPES, *ORDINALS, "image", "left", "right", "middle"))]
    split = [word for word in words if len(loaded.encode(word)) != 1]
    if split:
        raise RuntimeError(f"{len(split)} words should be one token each but are not: {split}; raise VOCAB_SIZE")
    print(f"tokenizer: {len(loaded)} tokens of which {num_added} added")
    return loaded


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and their cell-by-cell labels
# ---------------------------------------------------------------------------------------------------------------------


def render_pixels(scene: Scene) -> np.ndarray:
    """The picture as the image processor sees it before normalisation: uint8 [IMAGE_SIZE, IMAGE_SIZE, 3]."""
    return np.asarray(render(scene).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def normalize(pixels: Tensor) -> Tensor:
    """uint8 [b, height, width, 3] -> float [b, 3, height, width] in -1..1 (mean and std 0.5)."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ScenePool:
    """`scenes[i]` drawn as `pixels[i]`: uint8 [scenes, IMAGE_SIZE, IMAGE_SIZE, 3]."""

    scenes: list[Scene]
    pixels: Tensor


def make_pool(num_scenes: int, seed: int) -> ScenePool:
    """Scenes with one, two and three objects in turn."""
    scenes = [sample_scene(row_rng(Split.PRETRAIN, seed, i), 1 + i % MAX_OBJECTS) for i in range(num_scenes)]
    pixels = np.empty((num_scenes, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for i, scene in enumerate(scenes):
        pixels[i] = render_pixels(scene)
    return ScenePool(scenes=scenes, pixels=torch.from_numpy(pixels))


NO_COLOR, NO_SHAPE, NO_SIZE = len(COLORS), len(SHAPES), 2
LABEL_CLASSES = (NO_COLOR + 1, NO_SHAPE + 1, NO_COLOR + 1, NO_SHAPE + 1, NO_SIZE + 1)
"""Classes of a cell's five labels: colour and shape of the object that covers it; colour, shape and size of the object
whose centre it holds."""


def label_cells(scenes: list[Scene], cells: int) -> Tensor:
    """Labels of a grid over each picture: int64 [scenes, cells, cells, 5], rows first; see `LABEL_CLASSES`."""
    labels = np.empty((len(scenes), cells, cells, len(LABEL_CLASSES)), dtype=np.int64)
    labels[:] = (NO_COLOR, NO_SHAPE, NO_COLOR, NO_SHAPE, NO_SIZE)
    points = (np.arange(36) + 0.5) / 36
    colors = list(COLORS)
    for scene_labels, scene in zip(labels, scenes, strict=True):
        _, _, width, height = scene.crop
        best_cover = np.full((cells, cells), 0.15)
        for item in scene.objects:
            names = (colors.index(item.color), SHAPES.index(item.shape))
            radius = 0.45 * item.size * min(width, height)
            inside = ((points[None] - item.x) * width) ** 2 + ((points[:, None] - item.y) * height) ** 2 < radius**2
            cover = inside.reshape(cells, 36 // cells, cells, 36 // cells).mean(axis=(1, 3))
            scene_labels[cover > best_cover, :2] = names
            best_cover = np.maximum(best_cover, cover)
            scene_labels[int(item.y * cells), int(item.x * cells), 2:] = (*names, int(item.is_large))
    return torch.from_numpy(labels)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(parameters: Iterable[nn.Parameter], steps: int, peak_lr: float, step_loss: Callable[[], Tensor]) -> None:
    """AdamW, gradients clipped to norm 1, learning rate with 3% warm-up and cosine decay to zero."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup_steps = math.ceil(0.03 * steps)
    start = time.perf_counter()
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak_lr * min((step + 1) / warmup_steps, decay)
        loss = step_loss()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"  step {step:5d}/{steps}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s", flush=True)


def pool_cells(patches: Tensor) -> Tensor:
    """Average the patch grid to the 3 x 3 cells that a fresh resampler starts from: [b, 36, d] -> [b, 9, d]."""
    grid = patches.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(grid, CELLS).flatten(2).transpose(1, 2)


def make_tower(pool: ScenePool, test_pool: ScenePool, steps: int, batch_size: int, seed: int) -> SiglipVisionModel:
    """Train the tower to say, at every patch and every pooled cell, what is there. Prints its held-out accuracy."""
    config = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        vision_use_head=False,
    )
    torch.manual_seed(seed)
    tower = SiglipVisionModel(config)
    heads = nn.ModuleDict({name: nn.Linear(config.hidden_size, sum(LABEL_CLASSES)) for name in ("patches", "cells")})
    labels = {"patches": label_cells(pool.scenes, GRID), "cells": label_cells(pool.scenes, CELLS)}

    def step_loss() -> Tensor:
        rows = torch.randint(len(pool.scenes), (batch_size,))
        mirrored = torch.rand(batch_size) < 0.5
        pixels = torch.where(mirrored[:, None, None, None], pool.pixels[rows].flip(2), pool.pixels[rows])
        patches = tower(normalize(pixels)).last_hidden_state
        loss = patches.new_zeros(())
        for name, features in (("patches", patches), ("cells", pool_cells(patches))):
            target = torch.where(mirrored[:, None, None, None], labels[name][rows].flip(2), labels[name][rows])
            predicted = heads[name](features).flatten(0, 1).split(LABEL_CLASSES, dim=1)
            for logits, classes in zip(predicted, target.flatten(0, 2).unbind(1), strict=True):
                loss = loss + F.cross_entropy(logits, classes)
        return loss

    train([*tower.parameters(), *heads.parameters()], steps, 2e-3, step_loss)
    tower.bfloat16().float().eval().requires_grad_(False)
    target = label_cells(test_pool.scenes, CELLS).flatten(1, 2)[..., 2:]
    predicted = heads["cells"](pool_cells(encode_pictures(tower, test_pool.pixels))).split(LABEL_CLASSES, dim=2)[2:]
    has_center = target[..., 0] != NO_COLOR
    for i, name in enumerate(("color", "shape", "size")):
        right = predicted[i].argmax(-1) == target[..., i]
        print(
            f"  {name}: {right[has_center].float().mean():.3f} of the cells with an object's centre are right, "
            f"{right[~has_center].float().mean():.3f} of the others"
        )
    return tower


@torch.no_grad()
def encode_pictures(tower: SiglipVisionModel, pixels: Tensor) -> Tensor:
    """Features after post_layernorm: float [pictures, 36, d]."""
    return torch.cat([tower(normalize(chunk)).last_hidden_state for chunk in pixels.split(256)])


IGNORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One conversation in ChatML. `labels` repeats `ids` where the assistant speaks and is IGNORED elsewhere;
    `picture` is the row of the features that stand at its `<|image_pad|>` positions, None without a picture."""

    ids: list[int]
    labels: list[int]
    picture: int | None


def encode_conversation(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], picture: int | None = None) -> Example:
    ids: list[int] = []
    labels: list[int] = []
    for question, answer in turns:
        prompt_ids = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        answer_ids = tokenizer.encode(f"{answer}<|im_end|>")
        newline_ids = tokenizer.encode("\n")
        ids += prompt_ids + answer_ids + newline_ids
        labels += [IGNORED] * len(prompt_ids) + answer_ids + [IGNORED] * len(newline_ids)
    return Example(ids=ids, labels=labels, picture=picture)


class CaptionReader(nn.Module):
    """The decoder behind a linear connector from pooled tower features to its `<|image_pad|>` positions."""

    def __init__(self, decoder: Qwen3ForCausalLM, feature_dim: int, pad_id: int, image_pad_id: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.connector = nn.Linear(feature_dim, decoder.config.hidden_size)
        self.pad_id = pad_id
        self.image_pad_id = image_pad_id

    def forward(self, examples: list[Example], features: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the tokens of some conversations, pictures in place.

        Args:
            examples: conversations, padded here to the longest one.
            features: [pictures, 9, feature_dim]; an example's `picture` is a row of it.

        Returns:
            Logits [b, s - 1, v] and the labels of the next token [b, s - 1].
        """
        length = max(len(example.ids) for example in examples)
        ids = torch.tensor([e.ids + [self.pad_id] * (length - len(e.ids)) for e in examples])
        labels = torch.tensor([e.labels + [IGNORED] * (length - len(e.ids)) for e in examples])
        embeddings = self.decoder.get_input_embeddings()(ids)
        pictures = [example.picture for example in examples if example.picture is not None]
        if pictures:
            visual = self.connector(features[pictures])
            embeddings = embeddings.masked_scatter((ids == self.image_pad_id)[..., None], visual)
        # No attention mask: padding is at the end only, where causal attention keeps it out of sight.
        logits = self.decoder(inputs_embeds=embeddings, use_cache=False).logits
        return logits[:, :-1], labels[:, 1:]


def make_decoder(
    tokenizer: PreTrainedTokenizerBase,
    tower: SiglipVisionModel,
    pool: ScenePool,
    test_pool: ScenePool,
    steps: int,
    batch_size: int,
    seed: int,
) -> Qwen3ForCausalLM:
    """Train the decoder on two thirds text and one third captions. Prints the exact match of its answers to both."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    decoder = Qwen3ForCausalLM(config)
    image_pad_id = tokenizer.get_vocab()["<|image_pad|>"]
    reader = CaptionReader(decoder, tower.config.hidden_size, tokenizer.pad_token_id, image_pad_id)
    features = pool_cells(encode_pictures(tower, pool.pixels))
    image_text = f"<|vision_start|>{'<|image_pad|>' * CELLS**2}<|vision_end|>"
    rng = random.Random(seed)

    def caption_example(scenes: list[Scene], picture: int) -> Example:
        turn = sample_caption_turn(rng, list(scenes[picture].objects), image_text)
        return encode_conversation(tokenizer, [turn], picture)

    def text_example() -> Example:
        return encode_conversation(tokenizer, sample_text_conversation(rng))

    queue: list[list[Example]] = []

    def next_batch() -> list[Example]:
        """Batches of similar length: 8 batches are drawn at once and sorted, to pad less."""
        if not queue:
            drawn = [
                caption_example(pool.scenes, rng.randrange(len(pool.scenes))) if i % 3 == 0 else text_example()
                for i in range(8 * batch_size)
            ]
            drawn.sort(key=lambda example: len(example.ids))
            queue.extend(drawn[i : i + batch_size] for i in range(0, len(drawn), batch_size))
            rng.shuffle(queue)
        return queue.pop()

    def step_loss() -> Tensor:
        logits, labels = reader(next_batch(), features)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    train(reader.parameters(), steps, 2e-3, step_loss)
    decoder.bfloat16().float().eval().requires_grad_(False)
    test_features = pool_cells(encode_pictures(tower, test_pool.pixels))
    captions = [caption_example(test_pool.scenes, i) for i in range(len(test_pool.scenes))]
    texts = [text_example() for _ in range(len(captions))]
    for name, examples in (("captions", captions), ("text conversations", texts)):
        share = exact_match(reader, examples, test_features)
        print(f"  {name}: {share:.3f} of {len(examples)} answered without an error")
    return decoder


@torch.no_grad()
def exact_match(reader: CaptionReader, examples: list[Example], features: Tensor) -> float:
    """The share of conversations whose every answer token is the decoder's first choice, as greedy decoding needs."""
    right = 0
    for start in range(0, len(examples), 64):
        logits, labels = reader(examples[start : start + 64], features)
        right += ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(dim=1).sum().item()
    return right / len(examples)


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="gets the folders qwen3/ and siglip/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: fewer pictures and steps, to try it")
    args = parser.parse_args()
    start = time.perf_counter()
    qwen3_dir, siglip_dir = args.out / "qwen3", args.out / "siglip"

    tokenizer = make_tokenizer(qwen3_dir, args.seed)
    pool = make_pool(int(args.scale * NUM_PICTURES), args.seed)
    test_pool = make_pool(999, args.seed + 1)
    print(f"drew {len(pool.scenes)} pictures  {time.perf_counter() - start:.0f} s")

    tower = make_tower(pool, test_pool, steps=int(args.scale * TOWER_STEPS), batch_size=32, seed=args.seed)
    tower.bfloat16().save_pretrained(siglip_dir)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(siglip_dir)

    steps = int(args.scale * DECODER_STEPS)
    decoder = make_decoder(tokenizer, tower.float(), pool, test_pool, steps, batch_size=16, seed=args.seed)
    decoder.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    decoder.bfloat16().save_pretrained(qwen3_dir)

    for name, model in (("tower", tower), ("decoder", decoder)):
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    size_bytes = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {size_bytes / 1e6:.2f} MB, made in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
