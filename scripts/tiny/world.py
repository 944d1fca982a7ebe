"""The procedural world that tiny-wan is trained on: coloured shapes that move over textured, panning backgrounds.

A scene is a row of small tensors (`Scenes`), so that thousands are sampled, rendered and captioned as one batch on the GPU.
Objects have depth: earlier ones cover later ones and every object throws a soft shadow. Edges are anti-aliased, so that video
frames are band-limited and a small autoencoder can hold them.
"""

from __future__ import annotations

import dataclasses
import math

import torch

COLOURS = {
    "red": (225, 45, 40), "green": (45, 185, 70), "blue": (45, 85, 235), "yellow": (245, 220, 50),
    "purple": (165, 60, 215), "orange": (250, 140, 25), "cyan": (50, 215, 225), "white": (245, 245, 245),
}  # fmt: skip
BACKGROUND_COLOURS = {
    "gray": (115, 115, 120), "brown": (112, 80, 58), "navy": (36, 46, 88), "olive": (88, 96, 52), "black": (22, 22, 26),
    "beige": (196, 180, 150),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "ring")
SIZES = {"small": 0.12, "large": 0.19}  # radius as a share of the frame's shorter side
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
TEXTURES = ("plain", "checkered", "striped", "dotted", "cloudy")
CAMERAS = ("is still", "pans left", "pans right", "pans up", "pans down")
MAX_OBJECTS = 3

_CAMERA_VELOCITY = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
# Each texture is a mix of the same three waves: (wave 1 * wave 2, wave 1, wave 1 + wave 2 - 0.9, clouds, height).
_TEXTURE_MIX = ((0, 0, 0, 0, 1.5), (3, 0, 0, 0, 0), (0, 2.5, 0, 0, 0), (0, 0, 2.5, 0, 0), (0, 0, 0, 1.6, 0))


@dataclasses.dataclass
class Scenes:
    """B scenes.

    Integers are int64 indices into the tables above; lengths are shares of the frame's shorter side, times shares of the clip.
    """

    texture: torch.Tensor  # [B]
    camera: torch.Tensor  # [B]
    background: torch.Tensor  # [B, 2], two colours
    wave: torch.Tensor  # [B, 3, 3]: cycles along x and y per shorter side, phase
    camera_speed: torch.Tensor  # [B], shorter sides per clip
    count: torch.Tensor  # [B], 1 .. MAX_OBJECTS
    shape: torch.Tensor  # [B, K]
    colour: torch.Tensor  # [B, K]
    size: torch.Tensor  # [B, K]
    direction: torch.Tensor  # [B, K]
    speed: torch.Tensor  # [B, K], share of the frame's side along the direction, per clip
    centre: torch.Tensor  # [B, K, 2], place at half time, in [0, 1] of width and height

    def __len__(self) -> int:
        return len(self.texture)

    def to(self, device) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)})

    def __getitem__(self, index) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)})


def sample_scenes(batch: int, generator: torch.Generator) -> Scenes:
    """Draw `batch` random scenes on the generator's device; the objects of one scene have different colours."""
    device, k = generator.device, MAX_OBJECTS

    def integers(high, *shape):
        return torch.randint(high, shape, generator=generator, device=device)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator, device=device)

    angle = uniform(0, math.pi, batch, 1) + torch.tensor([0.0, math.pi / 2, math.pi / 4], device=device)
    cycles = uniform(1.4, 2.6, batch, 1) * torch.tensor([1.0, 1.0, 0.6], device=device)
    wave = torch.stack([cycles * angle.cos(), cycles * angle.sin(), uniform(0, 2 * math.pi, batch, 3)], -1)
    background = uniform(0, 1, batch, len(BACKGROUND_COLOURS)).argsort(1)[:, :2]
    colour = uniform(0, 1, batch, len(COLOURS)).argsort(1)[:, :k]
    direction = integers(len(DIRECTIONS), batch, k)
    travel = uniform(0.30, 0.46, batch, k)
    along = uniform(0.44, 0.56, batch, k)
    across = uniform(0.22, 0.78, batch, k)
    horizontal = direction < 2
    centre = torch.stack([torch.where(horizontal, along, across), torch.where(horizontal, across, along)], -1)
    return Scenes(
        texture=integers(len(TEXTURES), batch), camera=integers(len(CAMERAS), batch), background=background, wave=wave,
        camera_speed=uniform(0.2, 0.4, batch), count=1 + (uniform(0, 1, batch, 2) > torch.tensor([0.45, 0.6], device=device))
        .long().cumprod(1).sum(1), shape=integers(len(SHAPES), batch, k), colour=colour,
        size=integers(len(SIZES), batch, k), direction=direction, speed=travel, centre=centre,
    )  # fmt: skip


def captions(scenes: Scenes) -> list[str]:
    """One sentence a scene: objects from front to back, background, camera."""
    colours, backgrounds = list(COLOURS), list(BACKGROUND_COLOURS)
    sizes, directions = list(SIZES), list(DIRECTIONS)
    table = scenes.to("cpu")
    sentences = []
    for i in range(len(table)):
        objects = [
            f"a {sizes[table.size[i, j]]} {colours[table.colour[i, j]]} {SHAPES[table.shape[i, j]]} "
            f"moving {directions[table.direction[i, j]]}"
            for j in range(int(table.count[i]))
        ]
        first, second = (backgrounds[c] for c in table.background[i])
        ground = f"{first} and {second} {TEXTURES[table.texture[i]]} background"
        sentences.append(f"{' in front of '.join(objects)} over a {ground}, the camera {CAMERAS[table.camera[i]]}")
    return sentences


def _palette(table: dict, index: torch.Tensor) -> torch.Tensor:
    rgb = torch.tensor(list(table.values()), device=index.device, dtype=torch.float32) / 127.5 - 1.0
    return rgb[index]


def _signed_distance(shape: torch.Tensor, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Distance to the outline, negative inside; shape and r broadcast against x and y."""
    radius = (x * x + y * y).sqrt()
    ax, ay = x.abs(), y.abs()
    distance = radius - r
    distance = torch.where(shape == 1, torch.maximum(ax, ay) - 0.86 * r, distance)
    distance = torch.where(shape == 2, torch.maximum(0.866 * ax - 0.5 * y, y) - 0.58 * r, distance)
    distance = torch.where(shape == 3, (ax + ay) * 0.7071 - 0.8 * r, distance)
    return torch.where(shape == 4, (radius - 0.72 * r).abs() - 0.26 * r, distance)


def render(
    scenes: Scenes,
    frames: int,
    height: int,
    width: int,
    window: tuple[int, int] | None = None,
    offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Render scenes as video.

    Args:
        scenes: B scenes.
        frames, height, width: the clip's length and the canvas's size in pixels.
        window: height and width of the part that is rendered (default: the whole canvas).
        offset: int64 [B, 2], the window's top and left corner in pixels.

    Returns:
        float32 [B, 3, frames, h, w] in [-1, 1].
    """
    b, device = len(scenes), scenes.texture.device
    h, w = window or (height, width)
    short = min(height, width)
    rows = torch.arange(h, device=device, dtype=torch.float32).view(1, 1, h, 1) + 0.5
    columns = torch.arange(w, device=device, dtype=torch.float32).view(1, 1, 1, w) + 0.5
    if offset is not None:
        rows = rows + offset[:, 0].view(b, 1, 1, 1)
        columns = columns + offset[:, 1].view(b, 1, 1, 1)
    y, x = rows / short, columns / short  # [B or 1, 1, h, 1], [B or 1, 1, 1, w]
    time = (torch.arange(frames, device=device) / max(frames - 1, 1) - 0.5).view(1, frames, 1, 1)

    def per_clip(t):
        return t.view(b, 1, 1, 1)

    velocity = torch.tensor(_CAMERA_VELOCITY, device=device, dtype=torch.float32)[scenes.camera]
    velocity = velocity * scenes.camera_speed[:, None]
    bx, by = x + per_clip(velocity[:, 0]) * time, y + per_clip(velocity[:, 1]) * time
    waves = [
        torch.sin(2 * math.pi * (bx * per_clip(scenes.wave[:, i, 0]) + by * per_clip(scenes.wave[:, i, 1]))
                  + per_clip(scenes.wave[:, i, 2]))
        for i in range(3)
    ]  # fmt: skip
    mix = torch.tensor(_TEXTURE_MIX, device=device)[scenes.texture]
    terms = (waves[0] * waves[1], waves[0], waves[0] + waves[1] - 0.9, waves[0] + waves[1] * waves[2], 2 * by - 1)
    share = torch.sigmoid(2 * sum(per_clip(mix[:, i]) * term for i, term in enumerate(terms)))[
        :, None
    ]  # [B, 1, T, h, w]
    ground = _palette(BACKGROUND_COLOURS, scenes.background).view(b, 2, 3, 1, 1, 1)
    video = ground[:, 0] + (ground[:, 1] - ground[:, 0]) * share

    heading = torch.tensor(list(DIRECTIONS.values()), device=device)[scenes.direction]  # [B, K, 2]
    radii = torch.tensor(list(SIZES.values()), device=device)[scenes.size]
    paint = _palette(COLOURS, scenes.colour)
    for k in reversed(range(MAX_OBJECTS)):
        present = per_clip((scenes.count > k).float())
        cx = (per_clip(scenes.centre[:, k, 0]) + per_clip(heading[:, k, 0] * scenes.speed[:, k]) * time) * (
            width / short
        )
        cy = (per_clip(scenes.centre[:, k, 1]) + per_clip(heading[:, k, 1] * scenes.speed[:, k]) * time) * (
            height / short
        )
        dx, dy, r = x - cx, y - cy, per_clip(radii[:, k])
        shadow = torch.sigmoid((r * 0.95 - ((dx - 0.03) ** 2 + (dy - 0.05) ** 2).sqrt()) * 40) * 0.35 * present
        video = video + (-0.95 - video) * shadow[:, None]
        cover = torch.sigmoid(_signed_distance(per_clip(scenes.shape[:, k]), dx, dy, r) * (-2.2 * short)) * present
        shade = 1 - 0.22 * ((dx + 0.4 * r) ** 2 + (dy + 0.4 * r) ** 2) / (r * r)  # lit from the upper left
        colour = (paint[:, k].view(b, 3, 1, 1, 1) + 1) * shade.clamp(0.45, 1)[:, None] - 1
        video = video + (colour - video) * cover[:, None]
    return video
