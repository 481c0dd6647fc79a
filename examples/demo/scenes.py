"""Pictures for the demo: coloured shapes drawn over crops of real photographs, with captions, as LLaVA-form data.

The flow: `sample_scene` draws a random description (photograph, crop, objects) -> `render` makes its picture, `caption`
its sentence -> `write_llava_pretrain` and `write_heldout` write many of them to disk. Every random number comes from
`row_rng(split, seed, row)`, so a row depends on nothing but these three and no held-out scene can equal a training one
by construction of its seed.

The photographs ship inside installed packages; nothing is downloaded:

- scikit-image: astronaut (NASA), hubble_deep_field (NASA/ESA) and rocket (SpaceX): public domain or CC0; camera (Lav
  Varshney), chelsea (Stefan van der Walt), coffee (Rachel Michetti) and retina (Mikael Haggstrom): CC0.
- scikit-learn, CC BY 2.0 (https://creativecommons.org/licenses/by/2.0/): china.jpg by danielbuechele
  (https://www.flickr.com/photos/danielbuechele/6061409035) and flower.jpg by vultilion
  (https://www.flickr.com/photos/vultilion/6056698931). Changed here: cropped, dimmed, drawn over.
"""

import enum
import functools
import importlib.util
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "orange": (250, 140, 20),
    "yellow": (245, 225, 40),
    "green": (30, 160, 50),
    "blue": (40, 80, 225),
    "purple": (140, 45, 175),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")

# The one-sentence instructions of LLaVA-Pretrain (LLaVA, arXiv 2304.08485, table 11).
CAPTION_PROMPTS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)

PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "camera": ("skimage", "data/camera.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "hubble": ("skimage", "data/hubble_deep_field.jpg"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
MAX_PHOTO_SIDE = 640
"""Larger photographs are reduced to this, so that a crop of 96-200 pixels holds structure and not one flat tone."""

SUPERSAMPLING = 4
JPEG_QUALITY = 92
ROWS_PER_FOLDER = 1000
"""LLaVA-Pretrain puts 10,000 files in a folder; fewer here, so that a small data set has several folders too."""


class Split(enum.IntEnum):
    """Who may see a scene. The value is part of the random seed of its rows."""

    PRETRAIN = 0
    TRAIN = 1
    HELDOUT = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneObject:
    """One drawn shape. Lengths are fractions: `x` and `y` (the centre) of the crop's width and height, `size` (the
    diameter) of its shorter side. `angle` is in degrees."""

    shape: str
    color: str
    x: float
    y: float
    size: float
    angle: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def is_large(self) -> bool:
        """Sizes come from two separate bands (see `SIZE_BANDS`), so that this is never a matter of opinion."""
        return self.size > 0.42

    @property
    def position(self) -> str:
        """The ninth of the picture that holds the centre: "top left", "top", ..., "middle", ..., "bottom right"."""
        row = ("top", "", "bottom")[min(int(self.y * 3), 2)]
        column = ("left", "", "right")[min(int(self.x * 3), 2)]
        return f"{row} {column}".strip() or "middle"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """All that `render` needs. `objects` run from left to right; `crop` is (left, top, width, height) in pixels of the
    photograph; `seed` decides the small differences of tone between two pictures of the same description."""

    objects: tuple[SceneObject, ...]
    photo: str
    crop: tuple[int, int, int, int]
    seed: int


SIZE_BANDS = ((0.33, 0.39), (0.46, 0.56))
"""Small and large diameters, as fractions of the crop's shorter side."""
MIN_ORDER_GAP = 0.1
"""Centres of one scene differ by at least this along x (fraction of the width): "from left to right" is then clear."""


def row_rng(split: Split, seed: int, row: int) -> np.random.Generator:
    """The generator of one row. Different (split, seed, row) give independent streams (NumPy's SeedSequence)."""
    return np.random.default_rng((int(split), seed, row))


def sample_scene(rng: np.random.Generator, num_objects: int = 1) -> Scene:
    """Draw a random scene with `num_objects` (1 to 3) objects that do not overlap and differ in colour or shape."""
    if not 1 <= num_objects <= 3:
        raise ValueError(f"num_objects = {num_objects}: a scene holds 1 to 3 objects (more do not fit without overlap)")
    photo = list(PHOTOS)[rng.integers(len(PHOTOS))]
    photo_width, photo_height = _load_photo(photo).size
    width = int(rng.integers(96, 201))
    height = int(np.clip(round(width * rng.uniform(0.75, 1.33)), 96, 200))
    crop = (int(rng.integers(photo_width - width + 1)), int(rng.integers(photo_height - height + 1)), width, height)
    names = rng.choice(len(COLORS) * len(SHAPES), size=num_objects, replace=False)
    while True:
        bands = rng.integers(2, size=num_objects)
        bands[1:] *= num_objects < 3  # of three objects only one may be large: others would seldom fit
        sizes = rng.uniform(*np.transpose(SIZE_BANDS)[:, bands])
        half = sizes[:, None] * min(width, height) / (width, height) / 2
        centers = rng.uniform(half, 1 - half)
        if _are_apart(centers * (width, height), sizes * min(width, height), min_order_gap=MIN_ORDER_GAP * width):
            break
    objects = tuple(
        SceneObject(
            shape=SHAPES[names[i] % len(SHAPES)],
            color=list(COLORS)[names[i] // len(SHAPES)],
            x=float(centers[i, 0]),
            y=float(centers[i, 1]),
            size=float(sizes[i]),
            angle=rng.uniform(-15, 15),
        )
        for i in np.argsort(centers[:, 0])
    )
    return Scene(objects=objects, photo=photo, crop=crop, seed=int(rng.integers(2**31)))


def _are_apart(centers: np.ndarray, diameters: np.ndarray, *, min_order_gap: float) -> bool:
    """Whether no two objects touch and none is above another. `centers` is [objects, 2]; all lengths are in pixels."""
    for i in range(len(centers)):
        for j in range(i):
            dx, dy = abs(centers[i] - centers[j])
            if dx < min_order_gap or max(dx, dy) < 1.06 * (diameters[i] + diameters[j]) / 2:
                return False
    return True


@functools.cache
def _load_photo(name: str) -> Image.Image:
    package, relative = PHOTOS[name]
    # find_spec locates the package without importing it: scikit-learn's import alone costs a second.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"photograph {name!r} ships with the package {package!r}, which is not installed: "
            "pip install scikit-image scikit-learn"
        )
    image = Image.open(Path(spec.submodule_search_locations[0]) / relative).convert("RGB")
    image.thumbnail((MAX_PHOTO_SIDE, MAX_PHOTO_SIDE), Image.Resampling.LANCZOS)
    return image


@functools.cache
def _outline(shape: str) -> np.ndarray:
    """Corner points of a shape of diameter 1 around the origin, y downwards. Returns float64 [points, 2]."""
    if shape == "circle":
        turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        return 0.5 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if shape == "square":
        return 0.43 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    if shape == "triangle":
        return np.array([[0, -0.5], [0.5, 0.42], [-0.5, 0.42]])
    if shape == "star":
        turn = -np.pi / 2 + np.arange(10) * np.pi / 5
        radius = np.where(np.arange(10) % 2 == 0, 0.53, 0.22)
        return radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if shape == "cross":
        arm, end = 0.16, 0.5
        right_arm = [(arm, -arm), (end, -arm), (end, arm), (arm, arm)]
        return np.array([p for turns in range(4) for p in (_quarter_turns(q, turns) for q in right_arm[:3])])
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        return np.stack([x, y - 2.5], axis=1) / 32
    raise ValueError(f"unknown shape {shape!r}: expected one of {', '.join(SHAPES)}")


def _quarter_turns(point: tuple[float, float], turns: int) -> tuple[float, float]:
    x, y = point
    for _ in range(turns):
        x, y = -y, x
    return x, y


def render(scene: Scene) -> Image.Image:
    """Draw the scene. Returns an RGB picture of the crop's width and height; equal scenes give equal pixels."""
    rng = np.random.default_rng(scene.seed)
    left, top, width, height = scene.crop
    picture = _load_photo(scene.photo).crop((left, top, left + width, top + height))
    picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.7, 1.1))
    for item in scene.objects:
        _draw(picture, item, rng)
    return picture


def _draw(picture: Image.Image, item: SceneObject, rng: np.random.Generator) -> None:
    """Draw one anti-aliased object with a thin border, light around dark colours and dark around light ones: without it
    a black object on a night sky could not be seen."""
    diameter = item.size * min(picture.size)
    fill = np.clip(np.array(COLORS[item.color]) + rng.integers(-12, 13, size=3), 0, 255)
    border = (235, 235, 235) if fill @ (0.299, 0.587, 0.114) < 110 else (30, 30, 30)
    angle = math.radians(item.angle)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    center = np.array([item.x * picture.width, item.y * picture.height])
    corner = np.floor(center - 0.6 * diameter).astype(int)
    side = math.ceil(1.2 * diameter) + 1
    points = (_outline(item.shape) @ rotation * diameter + center - corner) * SUPERSAMPLING
    polygon = [(x, y) for x, y in points.tolist()]
    outside = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    inside = outside.copy()
    border_width = SUPERSAMPLING * max(1, round(diameter / 30))
    ImageDraw.Draw(outside).polygon(polygon, fill=255)
    draw = ImageDraw.Draw(inside)
    draw.polygon(polygon, fill=255)
    draw.line([*polygon, polygon[0], polygon[1]], fill=0, width=2 * border_width, joint="curve")
    at = (int(corner[0]), int(corner[1]))
    picture.paste(border, at, outside.reduce(SUPERSAMPLING))
    picture.paste(tuple(fill.tolist()), at, inside.reduce(SUPERSAMPLING))


def caption(scene: Scene) -> str:
    """The scene in words, objects from left to right: "a red circle", "a red circle and an orange star"."""
    return join_words([with_article(item.name) for item in scene.objects])


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def join_words(words: list[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def caption_prompt(rng: np.random.Generator) -> str:
    """One of LLaVA-Pretrain's instructions with the `<image>` sentinel before or after it, as in the original."""
    prompt = str(rng.choice(CAPTION_PROMPTS))
    return f"<image>\n{prompt}" if rng.integers(2) else f"{prompt}\n<image>"


def write_llava_pretrain(out_dir: Path, num_rows: int, seed: int) -> Path:
    """Write `num_rows` training rows as LLaVA-Pretrain is published.

    Args:
        out_dir: gets `blip_laion_cc_sbu_558k.json` and `images/00000/000000000.jpg`, ...; each `image` is relative
            to `images/`, as the published rows are to the unpacked `images.zip`.
        num_rows: number of rows, each with its own picture of one object.
        seed: rows of different seeds are different scenes.

    Returns:
        The path of the JSON file.
    """
    rows = []
    for row in range(num_rows):
        rng = row_rng(Split.TRAIN, seed, row)
        scene = sample_scene(rng)
        row_id = f"{row // ROWS_PER_FOLDER:05d}{row % ROWS_PER_FOLDER:04d}"
        name = f"{row_id[:5]}/{row_id}.jpg"
        _save_jpeg(scene, out_dir / "images" / name)
        turns = [{"from": "human", "value": caption_prompt(rng)}, {"from": "gpt", "value": caption(scene)}]
        rows.append({"id": row_id, "image": name, "conversations": turns})
    path = out_dir / "blip_laion_cc_sbu_558k.json"
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="ascii")
    return path


def write_heldout(out_dir: Path, num: int, seed: int) -> Path:
    """Write `num` held-out caption questions: `heldout.jsonl` and the pictures under `heldout/`.

    Returns:
        The path of `heldout.jsonl`, whose lines are {"images": [paths relative to `out_dir`], "question", "answer"}.
    """
    path = out_dir / "heldout.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in range(num):
        rng = row_rng(Split.HELDOUT, seed, row)
        scene = sample_scene(rng)
        name = f"heldout/{row:05d}.jpg"
        _save_jpeg(scene, out_dir / name)
        lines.append({"images": [name], "question": caption_prompt(rng), "answer": caption(scene)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="ascii")
    return path


def _save_jpeg(scene: Scene, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    render(scene).save(path, quality=JPEG_QUALITY)


def chance(answers: Iterable[str]) -> float:
    """The exact match of the best constant answer."""
    answers = list(answers)
    return max(answers.count(answer) for answer in set(answers)) / len(answers)
