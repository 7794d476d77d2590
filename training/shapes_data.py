"""Captioned pictures drawn by code: flat shapes on a flat background, and the sentences that say what is there.

Everything is drawn in torch on one device from one generator, so a seed gives the same pictures again. A scene's
numbers (which shapes, which colours, where) are drawn first; `render` turns them into pictures with signed distance
functions and one pixel of antialiasing.

Some combinations are held out: `draw_scenes(..., held_out=True)` draws only from those, and the training data has
none of them (see `held_pair`, `held_place` and `held_count`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 44),
    "orange": (250, 140, 22),
    "yellow": (250, 218, 46),
    "green": (34, 160, 72),
    "cyan": (64, 205, 225),
    "blue": (36, 84, 214),
    "purple": (128, 48, 172),
    "pink": (250, 142, 190),
    "white": (255, 255, 255),
    "grey": (140, 144, 150),
    "black": (18, 18, 22),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "heart")
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
VOCABULARY = (
    "",  # padding, and the word that an empty prompt consists of
    *("a", "an", "the", "two", "three", "four", "small", "large"),
    *COLOURS,
    *SHAPES,
    *(shape + "s" for shape in SHAPES),
    *("above", "over", "below", "under", "left", "right", "to", "of", "inside", "and"),
    *("in", "at", "on", "top", "bottom", "center", "corner", "background"),
)
LENGTH = 22
"""Words in a padded caption. Neither 22 nor the 256 image tokens nor their sum divides by 3."""
OBJECTS = 4
"""The most shapes in one picture."""
KINDS = ("one", "pair", "inside", "count", "rows", "places", "three")
SHARES = (0.20, 0.30, 0.08, 0.12, 0.10, 0.12, 0.08)

ID = {word: index for index, word in enumerate(VOCABULARY)}
WHITE = list(COLOURS).index("white")
ORANGE = list(COLOURS).index("orange")
JITTER = 0.02
"""How far a shape's centre may be from its place, in picture widths."""


@dataclass
class Scenes:
    """What is in B pictures; lengths are in picture widths, ``colour`` -1 says that there is no such shape."""

    words: Tensor  # [B, LENGTH], indices into VOCABULARY
    kind: Tensor  # [B], index into KINDS
    background: Tensor  # [B], index into COLOURS
    shape: Tensor  # [B, OBJECTS], index into SHAPES
    colour: Tensor  # [B, OBJECTS], index into COLOURS
    x: Tensor  # [B, OBJECTS], centre, from the left
    y: Tensor  # [B, OBJECTS], centre, from the top
    r: Tensor  # [B, OBJECTS], about half the width of the shape

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        return Scenes(*(getattr(self, field.name)[index] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.words)

    @staticmethod
    def cat(parts: list[Scenes]) -> Scenes:
        return Scenes(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Scenes)))

    def prompts(self) -> list[str]:
        """The captions as sentences."""
        return [" ".join(VOCABULARY[word] for word in row if word) for row in self.words.tolist()]


# ---------------------------------------------------------------------------------------------- what is held out


def _hash(*numbers: int) -> int:
    """A well mixed 32-bit number, the same on every machine and in every version (FNV-1a with a final mix)."""
    value = 2166136261
    for number in numbers:
        value = ((value ^ number) * 16777619) & 0xFFFFFFFF
    value = ((value ^ (value >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    return value ^ (value >> 13)


def _table(tag: int, rows: int, columns: int, symmetric: bool = False) -> Tensor:
    """One in ten entries is True."""

    def held(row: int, column: int) -> bool:
        pair = (min(row, column), max(row, column)) if symmetric else (row, column)
        return _hash(tag, *pair) % 10 == 0

    return torch.tensor([[held(row, column) for column in range(columns)] for row in range(rows)])


_THINGS = len(COLOURS) * len(SHAPES)
held_pair = _table(1, _THINGS, _THINGS, symmetric=True)
"""[things, things]: two coloured shapes that no training picture has together. A thing is colour * 6 + shape."""
_red_circle, _blue_square = 0, list(COLOURS).index("blue") * len(SHAPES) + 1
held_pair[_red_circle, _blue_square] = held_pair[_blue_square, _red_circle] = True
held_place = _table(2, _THINGS, len(PLACES))
"""[things, places]: a coloured shape that no training picture has alone at that place."""
held_count = _table(3, _THINGS, 5)
"""[things, count]: a coloured shape that no training picture has alone in that number."""


# ---------------------------------------------------------------------------------------------- scenes and captions

_Slots = list[Tensor]


class _Draw:
    """``m`` rows of random choices."""

    def __init__(self, m: int, generator: torch.Generator) -> None:
        self.m, self.generator, self.device = m, generator, generator.device
        mention = self.flip(0.6)
        self.background = torch.where(mention, self.pick(len(COLOURS)), WHITE)
        on = [self.word(w) for w in ("on", "a", "background")]
        orange = torch.where(self.background == ORANGE, ID["an"], ID["a"])
        name = self.words(tuple(COLOURS), self.background)
        self.ending = [torch.where(mention, w, 0) for w in (on[0], orange, name, on[2])]
        self.article = self.choose(0.75, 0.10, 0.15)  # a/an, the, none

    def pick(self, n: int) -> Tensor:
        return torch.randint(n, (self.m,), generator=self.generator, device=self.device)

    def flip(self, probability: float) -> Tensor:
        return torch.rand(self.m, generator=self.generator, device=self.device) < probability

    def choose(self, *shares: float) -> Tensor:
        u = torch.rand(self.m, generator=self.generator, device=self.device)
        return torch.stack([u >= sum(shares[: i + 1]) for i in range(len(shares) - 1)]).sum(0)

    def full(self, value: float) -> Tensor:
        return torch.full((self.m,), value, device=self.device)

    def word(self, word: str) -> Tensor:
        return torch.full((self.m,), ID[word], device=self.device)

    def words(self, choices: tuple[str, ...], index: Tensor) -> Tensor:
        """The word that ``index`` chooses, for every row."""
        return torch.tensor([ID[choice] for choice in choices], device=self.device)[index]

    def phrase(self, choices: tuple[str, ...], index: Tensor) -> _Slots:
        """The same for phrases: one slot for each word of the longest."""
        longest = max(len(choice.split()) for choice in choices)
        split = [(choice.split() + [""] * longest)[:longest] for choice in choices]
        return list(torch.tensor([[ID[w] for w in words] for words in split], device=self.device)[index].unbind(1))

    def colour(self) -> Tensor:
        """Any colour but the background's."""
        return (self.background + 1 + self.pick(len(COLOURS) - 1)) % len(COLOURS)

    def noun(self, colour: Tensor, shape: Tensor, size: Tensor | None = None, count: Tensor | None = None) -> _Slots:
        """``a small red circle`` or ``three red circles``."""
        count = torch.ones_like(colour) if count is None else count
        size = torch.zeros_like(colour) if size is None else size
        a = torch.where((colour == ORANGE) & (size == 0), ID["an"], ID["a"])
        article = torch.stack([a, self.word("the"), self.word("")]).gather(0, self.article[None])[0]
        number = self.words(("", "", "two", "three", "four"), count)
        plural = self.words(tuple(shape + "s" for shape in SHAPES), shape)
        return [
            torch.where(count == 1, article, number),
            self.words(("", "small", "large"), size),
            self.words(tuple(COLOURS), colour),
            torch.where(count == 1, self.words(SHAPES, shape), plural),
        ]

    def radius(self, size: Tensor, radii: tuple[float, float, float]) -> Tensor:
        """``radii`` for no size word, small and large."""
        jitter = 1 + 0.06 * (2 * torch.rand(self.m, generator=self.generator, device=self.device) - 1)
        return torch.tensor(radii, device=self.device)[size] * jitter

    def scenes(self, kind: str, slots: _Slots, objects: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]) -> Scenes:
        """Pack slots and (colour, shape, x, y, r) columns; centres move by the jitter and stay inside."""
        words = torch.stack([*slots, *self.ending], 1)
        order = torch.argsort((words == 0).to(torch.int8), dim=1, stable=True)
        words = words.gather(1, order)
        assert not words[:, LENGTH:].any()
        words = torch.nn.functional.pad(words, (0, max(0, LENGTH - words.shape[1])))[:, :LENGTH]
        none = (self.full(-1).long(), self.full(0).long(), self.full(0.5), self.full(0.5), self.full(0.1))
        columns = [objects[k] if k < len(objects) else none for k in range(OBJECTS)]
        colour, shape, x, y, r = (torch.stack([column[i] for column in columns], 1) for i in range(5))
        move = 2 * torch.rand((2, *x.shape), generator=self.generator, device=self.device) - 1
        x, y = (c + JITTER * move[i] for i, c in enumerate((x, y)))
        edge = r * 1.12 + 0.01
        x, y = (torch.minimum(torch.maximum(c, edge), 1 - edge) for c in (x, y))
        kinds = torch.full_like(self.background, KINDS.index(kind))
        return Scenes(words, kinds, self.background, shape, colour, x, y, r)


def _held_together(things: list[Tensor]) -> Tensor:
    table = held_pair.to(things[0].device)
    held = torch.zeros_like(things[0], dtype=torch.bool)
    for i, one in enumerate(things):
        for other in things[:i]:
            held |= table[one, other]
    return held


def _thing(colour: Tensor, shape: Tensor) -> Tensor:
    return colour * len(SHAPES) + shape


_THIRDS = (0.22, 0.5, 0.78)


def _at(d: _Draw, place: Tensor) -> tuple[Tensor, Tensor]:
    thirds = torch.tensor(_THIRDS, device=d.device)
    return thirds[place % 3], thirds[place // 3]


def _place_words(d: _Draw, place: Tensor, corner: Tensor | None = None) -> _Slots:
    """``in the top left corner``"""
    slots = [d.words(("in", "at", "on"), d.pick(3)), d.word("the"), *d.phrase(PLACES, place)]
    if corner is None:
        return slots
    is_corner = (place % 2 == 0) & (place != 4)
    return [*slots, torch.where(corner & is_corner, ID["corner"], 0)]


def _one(d: _Draw) -> tuple[Scenes, Tensor]:
    """``a large red circle in the top left``; without a place it is in the center."""
    colour, shape, size, place = d.colour(), d.pick(len(SHAPES)), d.choose(0.5, 0.25, 0.25), d.pick(len(PLACES))
    silent = d.flip(0.2)
    place = torch.where(silent, 4, place)
    where = [torch.where(silent, 0, w) for w in _place_words(d, place, d.flip(0.3))]
    x, y = _at(d, place)
    r = d.radius(size, (0.13, 0.08, 0.19))
    scenes = d.scenes("one", [*d.noun(colour, shape, size), *where], [(colour, shape, x, y, r)])
    return scenes, held_place.to(d.device)[_thing(colour, shape), place]


_RELATIONS = (
    *("above", "over", "below", "under"),
    *("left of", "to the left of", "right of", "to the right of", "on the left of", "on the right of", "and"),
)
_SIDES = (0, 0, 1, 1, 2, 2, 3, 3, 2, 3, 2)  # above, below, left, right


def _pair(d: _Draw) -> tuple[Scenes, Tensor]:
    """``a red circle above a blue square``; ``and`` puts the first at the left."""
    relation = d.choose(0.18, 0.05, 0.18, 0.05, 0.09, 0.09, 0.09, 0.09, 0.03, 0.03, 0.12)
    side = torch.tensor(_SIDES, device=d.device)[relation]
    first = torch.where(side % 2 == 0, 0.27, 0.73)
    x1 = torch.where(side < 2, 0.5, first)
    y1 = torch.where(side < 2, first, 0.5)
    colours, shapes = (d.colour(), d.colour()), (d.pick(len(SHAPES)), d.pick(len(SHAPES)))
    sizes = tuple(d.choose(0.6, 0.2, 0.2) for _ in range(2))
    radii = tuple(d.radius(size, (0.14, 0.08, 0.19)) for size in sizes)
    one, two = (d.noun(*noun) for noun in zip(colours, shapes, sizes, strict=True))
    objects = [(colours[0], shapes[0], x1, y1, radii[0]), (colours[1], shapes[1], 1 - x1, 1 - y1, radii[1])]
    scenes = d.scenes("pair", [*one, *d.phrase(_RELATIONS, relation), *two], objects)
    return scenes, _held_together([_thing(colours[i], shapes[i]) for i in range(2)])


def _inside(d: _Draw) -> tuple[Scenes, Tensor]:
    """``a red circle inside a blue square``"""
    colour, shape, outer_colour, outer_shape = d.colour(), d.pick(len(SHAPES)), d.colour(), d.pick(len(SHAPES))
    slots = [*d.noun(colour, shape), d.word("inside"), *d.noun(outer_colour, outer_shape)]
    centre, zero = d.full(0.5), torch.zeros_like(colour)
    big, small = d.radius(zero, (0.33, 0, 0)), d.radius(zero, (0.11, 0, 0))
    scenes = d.scenes(
        "inside",
        slots,
        [(outer_colour, outer_shape, centre, centre, big), (colour, shape, centre, centre, small)],
    )
    held = _held_together([_thing(colour, shape), _thing(outer_colour, outer_shape)])
    scenes.colour[:, 0] = torch.where(colour == outer_colour, -2, outer_colour)  # same colour: drop the row
    return scenes, held


def _row(count: Tensor, k: int) -> Tensor:
    """The x of the k-th of ``count`` shapes side by side."""
    spacing = torch.where(count == 3, 0.3, 0.4)
    return 0.5 + spacing * (k - (count - 1) / 2)


def _count(d: _Draw) -> tuple[Scenes, Tensor]:
    """``three small red circles``: two and three are in a row, four in a square."""
    colour, shape, count, size = d.colour(), d.pick(len(SHAPES)), 2 + d.pick(3), d.choose(0.6, 0.2, 0.2)
    r = d.radius(size, (0.1, 0.065, 0.12))
    objects = []
    for k in range(4):
        x = torch.where(count == 4, 0.3 + 0.4 * (k % 2), _row(count, k))
        y = torch.where(count == 4, 0.3 + 0.4 * (k // 2), 0.5)
        objects.append((torch.where(count > k, colour, -1), shape, x, y, r))
    scenes = d.scenes("count", d.noun(colour, shape, size, count), objects)
    return scenes, held_count.to(d.device)[_thing(colour, shape), count]


def _rows(d: _Draw) -> tuple[Scenes, Tensor]:
    """``three red circles above a blue square``: one shape on one side, two or three on the other."""
    colours, shapes = (d.colour(), d.colour()), (d.pick(len(SHAPES)), d.pick(len(SHAPES)))
    many, first_many, relation = 2 + d.pick(2), d.flip(0.5), d.choose(0.4, 0.1, 0.4, 0.1)
    counts = (torch.where(first_many, many, 1), torch.where(first_many, 1, many))
    y = torch.where(relation < 2, 0.28, 0.72)
    r = tuple(d.radius(torch.zeros_like(many), (0.11, 0, 0)) for _ in range(2))
    objects = []
    for k in range(OBJECTS):
        of_first = counts[0] > k
        within = torch.where(of_first, k, k - counts[0])
        count = torch.where(of_first, counts[0], counts[1])
        x = 0.5 + torch.where(count == 3, 0.3, 0.4) * (within - (count - 1) / 2)
        colour = torch.where(of_first, colours[0], colours[1])
        colour = torch.where(k < counts[0] + counts[1], colour, -1)
        shape = torch.where(of_first, shapes[0], shapes[1])
        objects.append((colour, shape, x, torch.where(of_first, y, 1 - y), torch.where(of_first, r[0], r[1])))
    one, two = (d.noun(colours[i], shapes[i], None, counts[i]) for i in range(2))
    slots = [*one, *d.phrase(_RELATIONS[:4], relation), *two]
    return d.scenes("rows", slots, objects), _held_together([_thing(colours[i], shapes[i]) for i in range(2)])


def _places(d: _Draw) -> tuple[Scenes, Tensor]:
    """``a red circle in the top left and a blue square at the bottom``"""
    colours, shapes = (d.colour(), d.colour()), (d.pick(len(SHAPES)), d.pick(len(SHAPES)))
    first = d.pick(9)
    places = (first, (first + 1 + d.pick(8)) % 9)
    sizes = tuple(d.choose(0.75, 0.25) for _ in range(2))
    objects, slots = [], []
    for i in range(2):
        x, y = _at(d, places[i])
        objects.append((colours[i], shapes[i], x, y, d.radius(sizes[i], (0.12, 0.08, 0))))
        slots.append([*d.noun(colours[i], shapes[i], sizes[i]), *_place_words(d, places[i])])
    scenes = d.scenes("places", [*slots[0], d.word("and"), *slots[1]], objects)
    return scenes, _held_together([_thing(colours[i], shapes[i]) for i in range(2)])


def _three(d: _Draw) -> tuple[Scenes, Tensor]:
    """``a red circle, a blue square and a green star``: from the left to the right."""
    colours, shapes = [d.colour() for _ in range(3)], [d.pick(len(SHAPES)) for _ in range(3)]
    objects, slots = [], []
    for i in range(3):
        r = d.radius(torch.zeros_like(colours[i]), (0.11, 0, 0))
        objects.append((colours[i], shapes[i], d.full(0.2 + 0.3 * i), d.full(0.5), r))
        slots.append(d.noun(colours[i], shapes[i]))
    scenes = d.scenes("three", [*slots[0], *slots[1], d.word("and"), *slots[2]], objects)
    return scenes, _held_together([_thing(colours[i], shapes[i]) for i in range(3)])


_GRAMMAR: tuple[Callable[[_Draw], tuple[Scenes, Tensor]], ...] = (_one, _pair, _inside, _count, _rows, _places, _three)


def draw_scenes(n: int, generator: torch.Generator, held_out: bool = False) -> Scenes:
    """``n`` scenes in mixed order on the generator's device, all of them held out or none."""
    parts = []
    for i, kind in enumerate(_GRAMMAR):
        want = max(1, round(n * SHARES[i]))
        scenes, held = kind(_Draw(want * 30 + 200 if held_out else want * 2 + 64, generator))
        right = (held == held_out) & (scenes.colour[:, 0] != -2)
        part = scenes[right.nonzero()[:want, 0]]
        assert len(part) == want
        parts.append(part)
    everything = Scenes.cat(parts)
    order = torch.randperm(len(everything), generator=generator, device=generator.device)
    picked = everything[order[:n]]
    if len(picked) < n:
        picked = Scenes.cat([picked, draw_scenes(n - len(picked), generator, held_out)])
    return picked


# ---------------------------------------------------------------------------------------------- pictures


def distances(x: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    """Signed distance to each of SHAPES at (x, y) from its centre, y upwards; formulas by Inigo Quilez (MIT)."""
    length = torch.sqrt(x * x + y * y + 1e-12)
    circle = length - r
    ring = (length - 0.76 * r).abs() - 0.26 * r

    half = 0.88 * r
    dx, dy = x.abs() - half, y.abs() - half
    outside = torch.sqrt(dx.clamp_min(0) ** 2 + dy.clamp_min(0) ** 2 + 1e-12)
    square = outside + torch.maximum(dx, dy).clamp_max(0)

    k, half = math.sqrt(3), 1.08 * r
    px, py = x.abs() - half, y + 0.2 * r + half / k
    flip = px + k * py > 0
    px, py = torch.where(flip, (px - k * py) / 2, px), torch.where(flip, (-k * px - py) / 2, py)
    px = px - torch.maximum(px.clamp_max(0), -2 * half)
    triangle = -torch.sqrt(px * px + py * py + 1e-12) * torch.sign(py)

    cos, sin, radius, ratio = math.cos(math.pi / 5), math.sin(math.pi / 5), 1.15 * r, 0.46
    px, py = x.abs(), y - 0.06 * r
    for kx, ky in ((cos, -sin), (-cos, -sin)):
        dot = 2 * (kx * px + ky * py).clamp_min(0)
        px, py = px - dot * kx, py - dot * ky
    px, py = px.abs(), py - radius
    bx, by = ratio * sin, ratio * cos - 1
    h = torch.minimum(((px * bx + py * by) / (bx * bx + by * by)).clamp_min(0), radius)
    star = torch.sqrt((px - bx * h) ** 2 + (py - by * h) ** 2 + 1e-12) * torch.sign(py * bx - px * by)

    scale = 1.7 * r
    px, py = x.abs() / scale, y / scale + 0.56
    lobe = torch.sqrt((px - 0.25) ** 2 + (py - 0.75) ** 2 + 1e-12) - math.sqrt(2) / 4
    along = 0.5 * (px + py).clamp_min(0)
    near = torch.minimum(px**2 + (py - 1) ** 2, (px - along) ** 2 + (py - along) ** 2)
    heart = torch.where(px + py > 1, lobe, torch.sqrt(near + 1e-12) * torch.sign(px - py)) * scale
    return circle, square, triangle, star, ring, heart


def columns(scenes: Scenes) -> tuple[Tensor, ...]:
    """What `render_columns` takes, with colours as RGB from 0 to 1."""
    palette = torch.tensor(list(COLOURS.values()), device=scenes.x.device) / 255
    rgb, background = palette[scenes.colour.clamp_min(0)], palette[scenes.background]
    return scenes.shape, rgb, scenes.colour >= 0, background, scenes.x, scenes.y, scenes.r


def render(scenes: Scenes, size: int = 256) -> Tensor:
    """[B, 3, size, size] in fp32 from 0 to 1."""
    return render_columns(columns(scenes), size)


def render_columns(columns: tuple[Tensor, ...], size: int) -> Tensor:
    """`render` on plain tensors, which is what compiles."""
    shape, rgb, there, background, x, y, r = columns
    grid = (torch.arange(size, device=x.device) + 0.5) / size
    picture = background[:, :, None, None].expand(-1, -1, size, size)
    for k in range(OBJECTS):
        column = slice(k, k + 1)
        px = (grid[None, None, :] - x[:, column, None]).expand(-1, size, -1)
        py = (y[:, column, None] - grid[None, :, None]).expand(-1, -1, size)
        which = shape[:, column, None]
        distance = torch.ones_like(px)
        for index, each in enumerate(distances(px, py, r[:, column, None])):
            distance = torch.where(which == index, each, distance)
        cover = ((0.5 - distance * size).clamp(0, 1) * there[:, column, None])[:, None]
        picture = picture + cover * (rgb[:, k, :, None, None] - picture)
    return picture
