"""Images of characters, drawn with the fonts of Debian's packages: a task with unseen families.

A class is a letter, whatever its case, or a digit. What many families draw alike (0 and O, 1, l and
I) is left out. Families are split between training and test before anything is drawn.
"""

from __future__ import annotations

import hashlib
import shutil
import string
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PACKAGES = (
    "fonts-adf-accanthis", "fonts-adf-baskervald", "fonts-adf-berenis", "fonts-adf-gillius",
    "fonts-adf-ikarius", "fonts-adf-irianis", "fonts-adf-libris", "fonts-adf-mekanus",
    "fonts-adf-oldania", "fonts-adf-romande", "fonts-adf-solothurn", "fonts-adf-switzera",
    "fonts-adf-tribun", "fonts-adf-universalis", "fonts-adf-verana", "fonts-aenigma",
    "fonts-averia-sans-gwf", "fonts-averia-serif-gwf", "fonts-b612", "fonts-cabin",
    "fonts-cantarell", "fonts-clear-sans", "fonts-comfortaa", "fonts-comic-neue",
    "fonts-courier-prime", "fonts-croscore", "fonts-crosextra-caladea", "fonts-crosextra-carlito",
    "fonts-dancingscript", "fonts-dejavu-extra", "fonts-dosis", "fonts-dustin",
    "fonts-ebgaramond", "fonts-ecolier-court", "fonts-fantasque-sans", "fonts-firacode",
    "fonts-freefont-ttf", "fonts-georgewilliams", "fonts-gfs-artemisia", "fonts-gfs-didot",
    "fonts-gfs-neohellenic", "fonts-go", "fonts-hack-ttf", "fonts-inconsolata",
    "fonts-jetbrains-mono", "fonts-junicode", "fonts-jura", "fonts-karla", "fonts-lato",
    "fonts-liberation", "fonts-linuxlibertine", "fonts-lobstertwo", "fonts-monofur",
    "fonts-mononoki", "fonts-national-park", "fonts-oldstandard", "fonts-open-sans",
    "fonts-paratype", "fonts-play", "fonts-quattrocento", "fonts-quicksand",
    "fonts-roboto-unhinted", "fonts-roboto-slab", "fonts-sil-andika", "fonts-sil-charis",
    "fonts-sil-gentiumplus", "fonts-vollkorn", "fonts-yanone-kaffeesatz",
)  # fmt: skip

CHARACTERS = "".join(c for c in string.ascii_letters + string.digits if c not in "lI01")
CLASSES = tuple(sorted({c.lower() for c in CHARACTERS}))
SIZE = 32
TRAINING, POOL, TEST = 60_000, 10_000, 12_000
FACES_PER_FAMILY = 3
TEST_SHARE = 0.3
_DRAWN = 64


@dataclass(frozen=True)
class Glyphs:
    """Grey images, uint8 [N, 32, 32], and classes, int64 [N]."""

    images: np.ndarray
    labels: np.ndarray


def fetch(folder: Path) -> list[Path]:
    """Unpack the packages' files under `folder`, nothing installed; the font files in it."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SystemExit("zoo: the fonts come in Debian's packages; run it where apt-get is.")
    for package in PACKAGES:
        place = folder / package
        if place.exists():
            continue
        fresh = folder / f".{package}"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        command = ["apt-get", "download", "-q", package]
        done = subprocess.run(command, cwd=fresh, capture_output=True, text=True, check=False)
        archives = list(fresh.glob("*.deb"))
        if done.returncode or not archives:
            last = (done.stderr.strip().splitlines() or ["no file came"])[-1]
            raise SystemExit(f"zoo: {package} could not be had ({last}); is apt set up?")
        subprocess.run(["dpkg-deb", "-x", archives[0], fresh], check=True)
        archives[0].unlink()
        fresh.rename(place)
    found = [p for package in PACKAGES for p in (folder / package).rglob("*.[to]tf")]
    return sorted(p for p in found if p.is_file() and not p.is_symlink())


def families(files: Sequence[Path]) -> dict[str, list[list[np.ndarray]]]:
    """Glyphs by family: for each of a few faces, one image [64, 64] a character."""
    from PIL import ImageFont

    found: dict[str, list[list[np.ndarray]]] = {}
    for path in files:
        try:
            font = ImageFont.truetype(str(path), 44)
            name = str(font.getname()[0])
            known = found.setdefault(name, [])
            if len(known) < FACES_PER_FAMILY and (face := _face(font)) is not None:
                known.append(face)
        except (OSError, ValueError):
            continue
    return {name: faces for name, faces in sorted(found.items()) if faces}


def _face(font: object) -> list[np.ndarray] | None:
    """The glyphs of a face, None where it lacks some or draws small letters as capitals."""
    from PIL import Image, ImageDraw

    glyphs: list[np.ndarray] = []
    for character in CHARACTERS:
        image = Image.new("L", (3 * _DRAWN, 3 * _DRAWN))
        draw = ImageDraw.Draw(image)
        draw.text((_DRAWN, _DRAWN), character, fill=255, font=font)
        box = image.getbbox()
        if box is None or min(box[2] - box[0], box[3] - box[1]) < 4:
            return None
        width, height = box[2] - box[0], box[3] - box[1]
        side = max(width, height)
        square = Image.new("L", (side, side))
        square.paste(image.crop(box), ((side - width) // 2, (side - height) // 2))
        pixels = square.resize((48, 48), Image.Resampling.BILINEAR)
        canvas = Image.new("L", (_DRAWN, _DRAWN))
        canvas.paste(pixels, ((_DRAWN - 48) // 2, (_DRAWN - 48) // 2))
        glyphs.append(np.asarray(canvas))
    if len({g.tobytes() for g in glyphs}) < len(glyphs):
        return None
    small, large = (glyphs[CHARACTERS.index(c)].astype(float) for c in "aA")
    return None if np.abs(small - large).mean() < 16 else glyphs


def split(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Families to train on and to test on, by a hash of their names."""

    def tests(name: str) -> bool:
        return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < TEST_SHARE * 2**32

    return [n for n in names if not tests(n)], [n for n in names if tests(n)]


def draw(faces: Sequence[Sequence[np.ndarray]], count: int, seed: int) -> Glyphs:
    """`count` images: random characters of random faces, moved, stained, blurred and noisy."""
    rng = np.random.default_rng(seed)
    images = np.empty((count, SIZE, SIZE), np.uint8)
    labels = np.empty(count, np.int64)
    for index, (glyph, label) in enumerate(_picked(faces, count, rng)):
        images[index], labels[index] = _photograph(glyph, rng), label
    return Glyphs(images, labels)


def _picked(
    faces: Sequence[Sequence[np.ndarray]], count: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, int]]:
    for _ in range(count):
        face = faces[rng.integers(len(faces))]
        which = int(rng.integers(len(CHARACTERS)))
        yield face[which], CLASSES.index(CHARACTERS[which].lower())


def _photograph(glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image, ImageFilter

    angle, shear = rng.normal(0, 0.14), rng.normal(0, 0.12)
    zoom = _DRAWN / SIZE * rng.uniform(0.85, 1.3)
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    matrix = np.array([[cos, -sin + shear * zoom], [sin, cos]])
    shift = np.full(2, _DRAWN / 2) - matrix @ (np.full(2, SIZE / 2) + rng.normal(0, 1.5, 2))
    values = (matrix[0, 0], matrix[0, 1], shift[0], matrix[1, 0], matrix[1, 1], shift[1])
    image = Image.fromarray(glyph).transform(
        (SIZE, SIZE), Image.Transform.AFFINE, values, Image.Resampling.BILINEAR
    )
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.1))))
    ink = np.asarray(image, np.float32) / 255
    slope = rng.normal(0, 0.12, 2)
    grid = np.linspace(-1, 1, SIZE, dtype=np.float32)
    base = rng.uniform(0.15, 0.85)
    ground = base + slope[0] * grid[:, None] + slope[1] * grid[None, :]
    contrast = rng.uniform(0.3, 0.8) * (1.0 if base < 0.5 else -1.0)
    noise = rng.normal(0, rng.uniform(0.03, 0.16), (SIZE, SIZE))
    return np.clip(255 * (ground + contrast * ink + noise), 0, 255).astype(np.uint8)


def made(folder: Path) -> dict[str, np.ndarray]:
    """Images and labels for training, the calibration pool and the test."""
    found = families(fetch(folder / "fonts"))
    training, test = split(list(found))
    seen = [face for name in training for face in found[name]]
    unseen = [face for name in test for face in found[name]]
    parts = {
        "training": draw(seen, TRAINING, 1), "pool": draw(seen, POOL, 2),
        "test": draw(unseen, TEST, 3),
    }  # fmt: skip
    arrays = {f"{part}_images": g.images for part, g in parts.items()}
    arrays |= {f"{part}_labels": g.labels for part, g in parts.items()}
    return arrays | {"families": np.array([len(training), len(test)])}
