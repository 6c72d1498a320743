"""Scenes that we draw ourselves: what is in them, what their captions say, and their pixels.

The models of this folder learn from nothing else. A scene is a value drawn from a seed;
its caption is made of one grammar, in long and short forms; its pixels are computed from
signed distances with torch, so that a GPU renders thousands a second.
Some combinations are held out: no model ever sees them in training, and all metrics are about them.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from attrs import frozen

#: Colours of shapes, and none of them is a background's.
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (222, 40, 38),
    "orange": (246, 140, 28),
    "yellow": (250, 222, 50),
    "green": (40, 165, 62),
    "cyan": (40, 200, 215),
    "blue": (40, 86, 225),
    "purple": (140, 50, 190),
    "pink": (248, 110, 180),
}
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "white": (245, 245, 242),
    "grey": (150, 150, 152),
    "black": (28, 28, 30),
    "beige": (228, 207, 165),
    "brown": (108, 72, 48),
    "navy": (26, 34, 84),
    "mint": (176, 226, 196),
    "lavender": (200, 186, 232),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "ring", "cross", "heart")
#: Radius as a part of the side of a square of the same area.
SIZES: Mapping[str, float] = {"small": 0.13, "medium": 0.19, "large": 0.26}
TEXTURES: Mapping[str, str] = {
    "plain": "plain",
    "stripes": "striped",
    "checks": "checked",
    "dots": "dotted",
    "gradient": "gradient",
}
HORIZONTAL = ("left", "centre", "right")
VERTICAL = ("top", "centre", "bottom")
#: What happens in a video, and the ways to say it; ``{}`` is the second colour.
MOTIONS: Mapping[str, tuple[str, ...]] = {
    "left": ("moves left", "moving left", "moves to the left", "slides left", "moves from right to left"),
    "right": ("moves right", "moving right", "moves to the right", "slides right", "moves from left to right"),
    "up": ("moves up", "moving up", "rises", "moves upwards", "moves from bottom to top"),
    "down": ("moves down", "moving down", "falls", "moves downwards", "moves from top to bottom"),
    "grows": ("grows", "growing", "gets bigger", "gets larger"),
    "shrinks": ("shrinks", "shrinking", "gets smaller"),
    "turns": ("turns {}", "turning {}", "changes colour to {}", "becomes {}"),
    "pan left": ("the camera pans left", "camera pan left", "the camera moves to the left"),
    "pan right": ("the camera pans right", "camera pan right", "the camera moves to the right"),
    "still": ("stays still", "does not move", "still", "is still"),
}
#: A pan is seen by what passes.
_PANNED_TEXTURES = ("stripes", "checks", "dots")
_TONE = 0.84

_COLOUR_NAMES, _MOTION_NAMES = tuple(COLOURS), tuple(MOTIONS)
#: Never trained on.
HELD_OUT_SHAPES = frozenset((colour, SHAPES[(3 * i + 2) % 8]) for i, colour in enumerate(COLOURS))
#: Of colour, shape and motion, for half of the shapes: a model that never sees anything green move left learns just
#: that, and turns it round.
HELD_OUT_MOTIONS = frozenset(
    (colour, SHAPES[(i + second) % 8], _MOTION_NAMES[(3 * i + offset) % 10])
    for i, colour in enumerate(COLOURS)
    for offset in (1, 4)
    for second in (0, 2, 4, 6)
)

_QUALITY = ("detailed", "best quality", "high quality", "photorealistic", "4k", "masterpiece", "beautiful", "simple")
#: Words that say nothing about a scene: a caption of them alone is trained as no caption.
_FILLER_TEXT = """
bad anatomy extra limbs deformed missing limbs worst quality low quality normal quality lowres deformed hands extra
fingers face malformed hands fingers distorted features text watermark logo signature anime cartoon graphic child minor
blurry jpeg artifacts frozen motion slideshow overexposed washed-out picture blurred detail compression blocks captions
body fused merged bodies heads wrong number of people faces conjoined arms legs missing head photo portrait painting
image drawing art style light dark bright soft warm cold golden neon sunset night day man woman boy girl person cat dog
fox horse bird tree forest flower garden mountain river lake sea coast rocky beach city street house castle lighthouse
bridge ship boat car train sky cloud rain snow storm moon sun fire water stone wood glass metal cinematic video scene
high best masterpiece realistic sharp focus vivid style shot view slow smooth walking running dancing dress hat table
"""
FILLER = _FILLER_TEXT.split()


@frozen(kw_only=True)
class Scene:
    """One shape on one background; with a motion it is a video."""

    shape: str
    colour: str
    size: str = "medium"
    across: str = "centre"
    down: str = "centre"
    background: str = "white"
    texture: str = "plain"
    motion: str | None = None
    second_colour: str = "red"
    #: What no caption says, each from 0 to 1: place (2), size, brightness, phase (2).
    jitter: tuple[float, ...] = (0.5,) * 6

    @property
    def is_held_out(self) -> bool:
        """Whether no model was trained on the like of it."""
        return (self.colour, self.shape) in HELD_OUT_SHAPES or self.is_held_out_motion

    @property
    def is_held_out_motion(self) -> bool:
        """Whether no model saw a shape of this colour move like that."""
        return (self.colour, self.shape, self.motion) in HELD_OUT_MOTIONS


def draw_scenes(
    count: int, seed: int, *, video: bool, held_out: bool = False, weights: Mapping[str, float] | None = None
) -> list[Scene]:
    """``count`` scenes, the same for the same ``seed``; all held out, or none of them.

    ``weights`` says of motions how many times as often as others they are drawn.
    """
    chance = random.Random(f"{seed} {video} {held_out}")
    most = max(1.0, *weights.values()) if weights else 1.0
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = _draw(chance, video=video)
        if weights and chance.random() * most >= weights.get(scene.motion or "", 1.0):
            continue
        is_wanted = (
            not scene.is_held_out if not held_out else (scene.is_held_out_motion if video else scene.is_held_out)
        )
        if is_wanted:
            scenes.append(scene)
    return scenes


def _draw(chance: random.Random, *, video: bool) -> Scene:
    motion = chance.choice(_MOTION_NAMES) if video else None
    colour = chance.choice(_COLOUR_NAMES)
    textures = _PANNED_TEXTURES if motion is not None and motion.startswith("pan") else tuple(TEXTURES)
    return Scene(
        shape=chance.choice(SHAPES),
        colour=colour,
        size=chance.choice(tuple(SIZES)),
        across=chance.choice(HORIZONTAL),
        down=chance.choice(VERTICAL),
        background=chance.choice(tuple(BACKGROUNDS)),
        texture=chance.choice(textures),
        motion=motion,
        second_colour=chance.choice([other for other in _COLOUR_NAMES if other != colour]),
        jitter=tuple(chance.random() for _ in range(6)),
    )


# What captions say.


def describe(scene: Scene) -> str:
    """The full caption in its plainest form; :func:`read_caption` reads it back."""
    parts = [f"a {_sized(scene)}{scene.colour} {scene.shape}"]
    if scene.motion is not None and not scene.motion.startswith("pan"):
        parts.append(MOTIONS[scene.motion][0].format(scene.second_colour))
    place = _place(scene)
    if place:
        parts.append(place)
    parts.append(f"on a {TEXTURES[scene.texture]} {scene.background} background")
    if scene.motion is not None and scene.motion.startswith("pan"):
        parts[-1] += f", {MOTIONS[scene.motion][0]}"
    return " ".join(parts)


def caption(scene: Scene, chance: random.Random) -> str:
    """Some caption of ``scene``: full or short, in one of many wordings, never untrue."""
    style = chance.random()
    if style < 0.05:
        return chance.choice([scene.colour, scene.shape, f"{scene.background} background", TEXTURES[scene.texture]])
    says = {part: chance.random() < share for part, share in _SAID.items()}
    if style < 0.25:
        says |= {"size": False, "place": False, "background": False}
    article = chance.choice(["a", "a", "a", "the", "one", ""])
    size = _sized(scene) if says["size"] and (scene.size != "medium" or chance.random() < 0.3) else ""
    colour = f"{scene.colour} " if says["colour"] else ""
    subject = f"{article} {size}{colour}{scene.shape if says['shape'] else chance.choice(['shape', 'thing'])}".strip()
    place = _place(scene) if says["place"] else ""
    motion, pan = "", ""
    if scene.motion is not None and says["motion"]:
        words = chance.choice(MOTIONS[scene.motion]).format(scene.second_colour)
        motion, pan = ("", words) if scene.motion.startswith("pan") else (words, "")
    background = _background(scene, chance) if says["background"] else ""
    if chance.random() < 0.12:
        listed = [subject, place, motion, pan, background.partition(" ")[2]]
        chance.shuffle(listed)
        text = ", ".join(part for part in listed if part)
    else:
        first, second = (motion, place) if chance.random() < 0.6 else (place, motion)
        text = " ".join(part for part in (subject, first, second, background) if part)
        if pan:
            text = f"{text}, {pan}" if chance.random() < 0.7 else f"{pan}, {text}"
    if chance.random() < 0.15:
        text = f"{chance.choice(['a picture of', 'a photo of', 'a video of', 'an image of', 'we see'])} {text}"
    if chance.random() < 0.15:
        text += "".join(f", {word}" for word in chance.sample([*_QUALITY, *FILLER], chance.randint(1, 4)))
    return text if chance.random() < 0.85 else text[:1].upper() + text[1:] + "."


def filler(chance: random.Random) -> str:
    """A text without a scene: nothing, or words that say nothing about one."""
    if chance.random() < 0.4:
        return ""
    count = chance.randint(1, 30)
    words = [_nonsense(chance) if chance.random() < 0.1 else chance.choice(FILLER) for _ in range(count)]
    return chance.choice([", ", " "]).join(words)


def read_caption(text: str) -> Scene | None:
    """The scene that a full description in the plainest form describes, or None."""
    match = _DESCRIPTION.fullmatch(text.strip())
    if match is None:
        return None
    motion = match["pan"] or match["motion"]
    name, second = _named_motion(motion)
    return Scene(
        shape=match["shape"],
        colour=match["colour"],
        size=match["size"] or "medium",
        across=_found(match["place"], HORIZONTAL),
        down=_found(match["place"], VERTICAL),
        background=match["background"],
        texture=next(texture for texture, word in TEXTURES.items() if word == match["texture"]),
        motion=name,
        second_colour=second or "red",
    )


def expand(text: str) -> Scene:
    """A whole scene, moving, that keeps what ``text`` says of one; the same for the same text."""
    words = text.lower()
    motion, second, rest = _said_motion(words)
    found = re.findall(r"[a-z]+", rest)

    def said(names: Iterable[str]) -> str | None:
        known = set(names)
        return next((word for word in found if word in known), None)

    shape, colour = said(SHAPES), said(COLOURS)
    shape = shape or (SHAPES[(_COLOUR_NAMES.index(colour) + 3) % 8] if colour else "star")
    colour = colour or _COLOUR_NAMES[(5 * SHAPES.index(shape) + 1) % 8]
    place, usual = SHAPES.index(shape), _COLOUR_NAMES.index(colour)
    motion = motion or ("right", "up", "left", "grows", "down", "turns", "right", "up")[place]
    texture = said(TEXTURES.values())
    textures = _PANNED_TEXTURES if motion.startswith("pan") else tuple(TEXTURES)
    return Scene(
        shape=shape,
        colour=colour,
        size=said(SIZES) or ("large", "large", "medium")[place % 3],
        across=said(("left", "right")) or "centre",
        down=said(("top", "bottom")) or "centre",
        background=said(BACKGROUNDS) or ("white", "navy", "black", "beige", "brown", "white", "mint", "grey")[usual],
        texture=next((name for name, word in TEXTURES.items() if word == texture), textures[usual % len(textures)]),
        motion=motion,
        second_colour=second or _COLOUR_NAMES[(usual + 3) % 8],
    )


def scene_words(text: str) -> set[str]:
    """The words of ``text`` that name a colour, a shape, a size, a background or a texture."""
    known = {*COLOURS, *SHAPES, *SIZES, *BACKGROUNDS, *TEXTURES.values()} - {"medium"}
    return {word for word in re.findall(r"[a-z]+", text.lower()) if word in known}


def vocabulary() -> list[str]:
    """All words that captions are made of, each once."""
    text = [*COLOURS, *BACKGROUNDS, *SHAPES, *SIZES, *TEXTURES.values(), *HORIZONTAL, *VERTICAL, *_QUALITY, *FILLER]
    text += [words.replace("{}", "") for ways in MOTIONS.values() for words in ways]
    text.append("a an the one of in on at with to from it over corner middle background shape thing we see against")
    return list(dict.fromkeys(word for words in text for word in words.lower().split()))


_SAID = {"size": 0.5, "colour": 0.9, "shape": 0.9, "place": 0.4, "background": 0.6, "motion": 0.9}


def _sized(scene: Scene) -> str:
    # What grows or shrinks has no one size.
    return "" if scene.motion in ("grows", "shrinks") or scene.size == "medium" else f"{scene.size} "


def _place(scene: Scene) -> str:
    across = "centre" if scene.motion in ("left", "right") else scene.across
    down = "centre" if scene.motion in ("up", "down") else scene.down
    if scene.motion is not None and scene.motion.startswith("pan"):
        across = "centre"
    if across != "centre" and down != "centre":
        return f"in the {down} {across} corner"
    if across != "centre":
        return f"on the {across}"
    if down != "centre":
        return f"at the {down}"
    return "" if scene.motion in ("left", "right", "up", "down") else "in the centre"


def _background(scene: Scene, chance: random.Random) -> str:
    texture = f"{TEXTURES[scene.texture]} " if chance.random() < 0.75 else ""
    return f"{chance.choice(['on', 'on', 'on', 'against', 'over', 'with'])} a {texture}{scene.background} background"


def _nonsense(chance: random.Random) -> str:
    return "".join(chance.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(chance.randint(2, 8)))


def _any(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, words))


_PLAIN_MOTIONS = [ways[0] for name, ways in MOTIONS.items() if not name.startswith("pan") and name != "turns"]
_DESCRIPTION = re.compile(
    rf"a (?:(?P<size>small|large) )?(?P<colour>{_any(COLOURS)}) (?P<shape>{_any(SHAPES)})"
    rf"(?: (?P<motion>{_any(_PLAIN_MOTIONS)}|turns (?:{_any(COLOURS)})))?"
    rf"(?: (?P<place>in the centre|on the (?:left|right)|at the (?:top|bottom)"
    rf"|in the (?:top|bottom) (?:left|right) corner))?"
    rf" on a (?P<texture>{_any(TEXTURES.values())}) (?P<background>{_any(BACKGROUNDS)}) background"
    rf"(?:, (?P<pan>the camera pans (?:left|right)))?"
)


def _named_motion(words: str | None) -> tuple[str | None, str | None]:
    if words is None:
        return None, None
    if words.startswith("turns "):
        return "turns", words.removeprefix("turns ")
    return next(name for name, ways in MOTIONS.items() if ways[0] == words), None


def _said_motion(words: str) -> tuple[str | None, str | None, str]:
    """The motion that a caption tells of, its second colour, and the caption without it."""
    for name, ways in MOTIONS.items():
        for way in sorted(ways, key=len, reverse=True):
            match = re.search(rf"\b{re.escape(way)}\b".replace(r"\{\}", f"({_any(COLOURS)})"), words)
            if match:
                second = match[1] if match.groups() else None
                return name, second, f"{words[: match.start()]} {words[match.end() :]}"
    return None, None, words


def _found(place: str | None, names: Sequence[str]) -> str:
    return next((name for name in names if name in (place or "").split()), "centre")


# What they look like.


def render(scenes: Sequence[Scene], width: int, height: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Pictures ``[scene, 3, height, width]`` from -1 to 1; of a video, its first frame."""
    return render_frames(scenes, width, height, 1, device)[:, :, 0]


def render_frames(
    scenes: Sequence[Scene], width: int, height: int, frames: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Videos ``[scene, 3, frames, height, width]`` from -1 to 1."""
    unit = math.sqrt(width * height)

    def column(value: Callable[[Scene], float]) -> torch.Tensor:
        return torch.tensor([value(scene) for scene in scenes], device=device, dtype=torch.float32)[:, None]

    def is_motion(*names: str) -> torch.Tensor:
        return column(lambda scene: float(scene.motion in names))

    def colour_of(name: Callable[[Scene], tuple[int, int, int]]) -> torch.Tensor:
        return torch.tensor([name(scene) for scene in scenes], device=device, dtype=torch.float32) / 255

    # [scene, frame]; the time of a single picture is a video's first.
    time = torch.linspace(0, 1, frames, device=device)[None] if frames > 1 else torch.zeros(1, 1, device=device)
    radius = column(lambda s: SIZES[s.size] * (0.95 + 0.1 * s.jitter[2])) * unit
    grown = 0.10 + 0.17 * (time * is_motion("grows") + (1 - time) * is_motion("shrinks"))
    changes_size = is_motion("grows", "shrinks")
    radius = changes_size * grown * unit + (1 - changes_size) * radius
    most = changes_size * 0.27 * unit + (1 - changes_size) * radius

    margin = most + 0.05 * unit
    across = _placed(
        column(lambda s: HORIZONTAL.index(s.across) / 2), column(lambda s: s.jitter[0]), width, margin, unit
    )
    down = _placed(column(lambda s: VERTICAL.index(s.down) / 2), column(lambda s: s.jitter[1]), height, margin, unit)
    left, right, up, falls = (is_motion(name) for name in ("left", "right", "up", "down"))
    # From edge to edge: what moves begins and ends with nearly half of it outside, or it would hardly move at all.
    edge = 0.6 * most
    way_x = edge + (width - 2 * edge) * (left * (1 - time) + right * time)
    way_y = edge + (height - 2 * edge) * (up * (1 - time) + falls * time)
    # Where the camera goes left, all that is seen goes right.
    pan = is_motion("pan left") - is_motion("pan right")
    passed = 0.4 * width * pan * (time - 0.5) if frames > 1 else torch.zeros_like(pan * time)
    across = torch.where(left + right > 0, way_x, torch.where(pan != 0, width / 2 + passed, across.expand_as(way_x)))
    down = torch.where(up + falls > 0, way_y, down.expand_as(way_y))

    y, x = torch.meshgrid(
        torch.arange(height, device=device) + 0.5, torch.arange(width, device=device) + 0.5, indexing="ij"
    )
    x, y = x[None, None], y[None, None]
    relative = [(at - middle[..., None, None]) / radius[..., None, None] for at, middle in ((x, across), (y, down))]
    which = torch.tensor([SHAPES.index(scene.shape) for scene in scenes], device=device)
    alpha = torch.empty(relative[0].shape, device=device)
    for index, shape in enumerate(SHAPES):
        chosen = which == index
        if bool(chosen.any()):
            distance = _DISTANCES[shape](relative[0][chosen], relative[1][chosen])
            alpha[chosen] = (0.5 - distance * radius[chosen][..., None, None]).clamp(0, 1)

    turned = ((time - 0.35) / 0.3).clamp(0, 1) * is_motion("turns")
    first, second = colour_of(lambda s: COLOURS[s.colour]), colour_of(lambda s: COLOURS[s.second_colour])
    ink = first[:, :, None] * (1 - turned[:, None]) + second[:, :, None] * turned[:, None]

    tone = _texture(x - passed[..., None, None], y, height, unit, column)
    brightness = 0.96 + 0.08 * column(lambda s: s.jitter[3])
    paper = colour_of(lambda s: BACKGROUNDS[s.background]) * brightness
    paper_frames = paper[:, :, None, None, None] * tone[:, None]
    shown = paper_frames * (1 - alpha[:, None]) + ink[..., None, None] * alpha[:, None]
    return shown.clamp(0, 1) * 2 - 1


def _placed(where: torch.Tensor, jitter: torch.Tensor, side: int, margin: torch.Tensor, unit: float) -> torch.Tensor:
    return (margin + (side - 2 * margin) * where + (jitter - 0.5) * 0.05 * unit).clamp(min=0)


def _texture(
    x: torch.Tensor,
    y: torch.Tensor,
    height: int,
    unit: float,
    column: Callable[[Callable[[Scene], float]], torch.Tensor],
) -> torch.Tensor:
    """The background's brightness, from ``_TONE`` to 1 (dark backgrounds get lighter), per pixel."""
    period = 0.25 * unit
    phases = [column(lambda s, i=i: s.jitter[i])[..., None, None] * period for i in (4, 5)]  # type: ignore[misc]
    u, v = x + phases[0], y + phases[1]
    soft = 2.0  # pixels that an edge takes

    def wave(at: torch.Tensor) -> torch.Tensor:
        # A square wave with edges of about two pixels, from -1 to 1.
        return (torch.sin(2 * torch.pi * at / period) * period / (torch.pi * soft)).clamp(-1, 1)

    across, along = wave(u), wave(v)
    in_cell = torch.hypot(torch.remainder(u, period) - period / 2, torch.remainder(v, period) - period / 2)
    looks = {
        "plain": torch.ones_like(u * v),
        "stripes": across.expand_as(u * v),
        "checks": across * along,
        "dots": ((in_cell - 0.28 * period) / (soft / 2)).clamp(-1, 1),
        "gradient": (1 - 2 * y / height).expand_as(u * v),
    }
    is_dark = column(lambda s: float(sum(BACKGROUNDS[s.background]) < 240))[..., None, None]
    amount = sum(
        looks[name].expand_as(u * v) * column(lambda s, name=name: float(s.texture == name))[..., None, None]  # type: ignore[misc]
        for name in TEXTURES
    )
    darker = 1 - (1 - _TONE) * (1 - amount) / 2
    lighter = 1 + 0.6 * (1 - amount) / 2
    return torch.where(is_dark > 0, lighter, darker)


def _circle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.hypot(x, y) - 0.95


def _square(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.85


def _diamond(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x.abs() + y.abs() - 1.05) * 0.7071


def _triangle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.maximum(y - 0.75, (x.abs() * 1.7 - y - 0.95) / 1.97)


def _ring(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (torch.hypot(x, y) - 0.72).abs() - 0.26


def _cross(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    bars = [torch.maximum(a.abs() - 0.98, b.abs() - 0.33) for a, b in ((x, y), (y, x))]
    return torch.minimum(bars[0], bars[1])


def _star(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # Five points: inside a circle whose radius runs straight from point to notch.
    angle = torch.remainder(torch.atan2(x, -y) + torch.pi / 5, 2 * torch.pi / 5) - torch.pi / 5
    r = torch.hypot(x, y)
    a, b = r * torch.cos(angle), r * torch.sin(angle.abs())
    # The line from (1.1, 0) to the notch at radius 0.46, 36 degrees on.
    nx, ny = 0.46 * 0.5878, 1.1 - 0.46 * 0.8090
    return ((a - 1.1) * nx + b * ny) / (nx**2 + ny**2) ** 0.5


def _heart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    lobes = torch.hypot(x.abs() - 0.46, y + 0.32) - 0.52
    point = torch.maximum((x.abs() + (y - 0.95) * 0.78) / 1.268, -y - 0.32)
    return torch.minimum(lobes, point)


_DISTANCES: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "diamond": _diamond,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
}
