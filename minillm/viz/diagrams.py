"""Two diagrams: the engine, part by part, and a decoder layer with its shapes and weights."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from minillm.errors import check_choice, check_kind
from minillm.model import ModelConfig
from minillm.viz.base import SMALL_SIZE, Picture, PictureError, pad, text_table
from minillm.viz.palette import BLACK, GREY, OWNER_COLORS, PART_COLORS, WHITE

Point = tuple[float, float]  # inches, from the upper left corner
WIDTH = 9.0  # inches, of both


class _Diagram(Picture):
    """Boxes and arrows on axes whose unit is the inch."""

    _height: float

    def _size(self) -> tuple[float, float]:
        return WIDTH, self._height

    def _title_width(self) -> float:
        return WIDTH

    def _empty(self, axes) -> None:
        axes.set(xlim=(0, WIDTH), ylim=(self._height, 0))
        axes.set_axis_off()


# --- the engine ------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A box of the engine: the chapter that builds it, what it does, and its place in the drawing.

    `place` is (x, y, width, height) in inches. `inside` is the part that it belongs to.
    """

    chapter: str
    what: str  # line ends apply only in the figure
    place: tuple[float, float, float, float]
    inside: str = ""


PARTS = {
    "server": Part("10", "takes requests from clients, and streams their tokens back", (0.1, 0.08, 8.8, 0.48)),
    "requests": Part("1", "a prompt each,\nand tokens so far", (0.1, 0.96, 1.5, 1.92)),
    "scheduler": Part("7", "who computes what\nin the next step", (2.0, 0.96, 2.35, 1.92)),
    "batches": Part("5–6", "many at once", (2.1, 1.8, 2.15, 0.44), "scheduler"),
    "chunks": Part("4", "of long prompts", (2.1, 2.34, 2.15, 0.44), "scheduler"),
    "pass": Part("2", "the model, once, for\nall tokens of the step", (4.75, 0.96, 2.35, 1.92)),
    "attention": Part("2", "tokens meet", (4.85, 1.8, 2.15, 0.44), "pass"),
    "kernels": Part("9", "on a GPU", (4.85, 2.34, 2.15, 0.44), "pass"),
    "tokens": Part("1", "one sampled for\neach request", (7.5, 0.96, 1.4, 1.92)),
    "cache": Part("3", "past keys and values", (2.0, 3.38, 5.1, 0.6)),
    "blocks": Part("8", "of a common pool", (4.85, 3.46, 2.15, 0.44), "cache"),
    "loop": Part("1", "each token goes back to its request, until that ends", (2.0, 4.32, 5.1, 0.48)),
}
FLOW = """\
server → requests → scheduler → pass → tokens → server
         requests ←←←←←← loop ←←←←←←← tokens
                           pass ←→ cache"""
ARROWS: tuple[tuple[Point, ...], ...] = (
    ((0.85, 0.56), (0.85, 0.96)),
    ((1.6, 1.38), (2.0, 1.38)),
    ((4.35, 1.38), (4.75, 1.38)),
    ((7.1, 1.38), (7.5, 1.38)),
    ((8.2, 0.96), (8.2, 0.56)),
    ((8.2, 2.88), (8.2, 4.56), (7.1, 4.56)),
    ((2.0, 4.56), (0.85, 4.56), (0.85, 2.88)),
    ((5.75, 2.88), (5.75, 3.38)),
    ((6.1, 3.38), (6.1, 2.88)),
)
NOTES = {"writes": (5.65, 3.13, "right"), "reads": (6.2, 3.13, "left")}
EXAMPLE = {"A": 6, "B": 4, "C": 5}  # request -> its number of tokens
SQUARE = 0.2  # inches, of a token


class EngineDiagram(_Diagram):
    """The whole engine: the path from a request to its tokens; each box has the number of the chapter that builds it.

    `today` names the part that is highlighted, with the parts inside it; the others fade. None shows all alike. Raises
    PictureError for an unknown part.
    """

    _height = 4.9

    def __init__(self, today: str | None = None, *, title: str | None = None):
        if today is not None:
            check_choice("today", today, tuple(PARTS), error=PictureError)
        self.today, self.title = today, title

    def is_lit(self, name: str) -> bool:
        """Whether `today` is this part, or the part that it is inside."""
        return self.today in (name, PARTS[name].inside)

    def text(self) -> str:
        lines = []
        for name, part in PARTS.items():
            mark = ">" if self.is_lit(name) else " "
            label = ("  " if part.inside else "") + name
            lines.append(f"{mark} {pad(label, 11)}  {pad(part.chapter, 7)}  {_in_a_line(part.what)}")
        return "\n".join([FLOW, "", "  part         chapter  what it does", *lines])

    def alt(self) -> str:
        way = "server, requests, scheduler, pass, tokens, and back to the requests; the pass reads and writes the cache"
        part = PARTS.get(self.today)
        today = f"; today: {self.today}, chapter {part.chapter}, {_in_a_line(part.what)}" if part else ""
        return f"{self.title or 'The engine'}: {way}{today}"

    def _draw(self, axes, step: int | None = None) -> None:
        self._empty(axes)
        for points in ARROWS:
            _draw_arrow(axes, points)
        for words, (x, y, side) in NOTES.items():
            _write(axes, x, y, words, ha=side, color=GREY)
        for name, part in PARTS.items():
            self._draw_part(axes, name, part)

    def _draw_part(self, axes, name: str, part: Part) -> None:
        lit, faded = self.is_lit(name), self.today is not None and not self.is_lit(name)
        ink = GREY if faded else BLACK
        fill = WHITE if faded else PART_COLORS[2 if lit else 0] if not part.inside else PART_COLORS[1]
        x, y, width, height = part.place
        box = _draw_box(axes, part.place, fill, edge=BLACK if lit else GREY, line=2.2 if name == self.today else 0.8)
        box.set_gid(name)
        middle = y + (0.25 if height > 1 else height / 2)
        badge = {"boxstyle": "round,pad=0.25", "facecolor": BLACK if lit else WHITE, "edgecolor": ink, "linewidth": 0.8}
        place = _write(axes, x + 0.15, middle, part.chapter, color=WHITE if lit else ink, bbox=badge)
        heading = _beside(axes, place, 11, name.capitalize(), color=ink, weight="bold")
        if height < 1:
            _beside(axes, heading, 7, part.what, color=ink)
            return
        _write(axes, x + 0.12, y + 0.45, part.what, color=ink, va="top")
        if name in ("requests", "tokens"):
            for row, request in enumerate(EXAMPLE):
                count = EXAMPLE[request] if name == "requests" else 1
                self._draw_tokens(axes, x + 0.14, y + 1.06 + row * 0.25, request, count, faded)

    def _draw_tokens(self, axes, x: float, y: float, request: str, count: int, faded: bool) -> None:
        """Draw `number` squares of a request, with its letter in the first."""
        color = WHITE if faded else OWNER_COLORS[list(EXAMPLE).index(request)]
        for place in range(count):
            _draw_box(axes, (x + place * SQUARE, y, SQUARE, SQUARE), color, edge=GREY, line=0.6, corner=0)
        _write(axes, x + SQUARE / 2, y + SQUARE / 2, request, ha="center", color=GREY if faded else BLACK)


def _in_a_line(words: str) -> str:
    return words.replace("\n", " ")


# --- a layer ---------------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """What happens to the tokens of a pass: the shape of the result, and the weights it uses."""

    names: tuple[str, ...]  # of boxes side by side
    what: str
    shape: str
    weights: int = 0
    product: str = ""  # how the weights are counted

    @property
    def is_sum(self) -> bool:
        """Whether it adds the residual: a sign instead of a box."""
        return self.names == ("+",)

    @property
    def half(self) -> float:
        """Inches from the middle of its box or sign to the edge."""
        return 0.1 if self.is_sum else 0.125


def stages(config: ModelConfig) -> dict[str, list[Stage]]:
    """Before the layers, in each of them, and after them."""
    hidden, wide, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    queries, keys, head = config.query_size, config.key_value_size, config.head_dim
    heads = f"q [T, {config.num_attention_heads}, {head}], k and v [T, {config.num_key_value_heads}, {head}]"
    into = f"({queries:,} + 2 × {keys:,})"
    if queries == keys:
        heads, into = f"q, k, v [T, {config.num_attention_heads}, {head}]", f"3 × {queries:,}"
    stream = f"[T, {hidden:,}]"
    norm = Stage(("RMSNorm",), "each token to one scale", stream, hidden, f"{hidden:,}")
    add = Stage(("+",), "residual: adds what came in", stream)
    qkv_bias, out_bias = (queries + 2 * keys) * config.qkv_bias, hidden * config.attention_out_bias
    mlp_in_bias, mlp_out_bias = 2 * wide * config.mlp_bias, hidden * config.mlp_bias
    head_norms = [Stage(("RMSNorm of q and k",), "head by head", heads, 2 * head, f"2 × {head}")] * config.qk_norm
    layer = [
        norm,
        _product(("Q", "K", "V"), "queries, keys, values", heads, into, hidden, queries + 2 * keys, qkv_bias),
        *head_norms,
        Stage(("RoPE",), "turns q and k by position", heads),
        Stage(("Attention",), "where tokens meet", f"[T, {queries:,}]"),
        _product(("Output matrix",), "the heads together again", stream, f"{hidden:,}", queries, hidden, out_bias),
        add,
        norm,
        _product(("Gate", "Up"), "to the width of the MLP", f"2 × [T, {wide:,}]", f"2 × {wide:,}", hidden, 2 * wide,
                 mlp_in_bias),
        Stage(("SiLU(gate) × up",), "up, scaled by the gate", f"[T, {wide:,}]"),
        _product(("Down",), "back to the hidden size", stream, f"{hidden:,}", wide, hidden, mlp_out_bias),
        add,
    ]  # fmt: skip
    tied = "the embedding again" if config.tie_word_embeddings else f"{hidden:,} × {vocab:,}"
    head_weights = 0 if config.tie_word_embeddings else hidden * vocab
    return {
        "before": [Stage(("Embedding",), "a row for each id", stream, vocab * hidden, f"{vocab:,} × {hidden:,}")],
        "layer": layer,
        "after": [
            norm._replace(names=("Final RMSNorm",)),
            Stage(("LM head",), "a score for each id", f"[T, {vocab:,}]", head_weights, tied),
        ],
    }


def _product(
    names: tuple[str, ...], what: str, shape: str, outputs: str, num_inputs: int, num_outputs: int, num_biases: int
) -> Stage:
    """One matrix per name, with `num_outputs` columns together; `outputs` writes that number as a formula."""
    product = f"{num_inputs:,} × {outputs}" + (f" + {num_biases:,}" if num_biases else "")
    return Stage(names, what, shape, num_inputs * num_outputs + num_biases, product)


ROW = 0.36  # inches, of a stage
SPINE, BOX_LEFT, BOX_WIDTH = 1.4, 0.62, 1.56  # inches: the line of the tokens, and the boxes on it
WHAT, SHAPE, COUNT = 2.36, 4.3, 8.8  # inches: where columns of words begin; where the last one ends
AROUND = 0.44  # inches: the line of the residual
MOST_SIGNS = 36  # characters of a product


class LayerDiagram(_Diagram):
    """One decoder layer, from the embedding to the scores: what each part does, its shape, and its weights.

    T is the number of tokens in the pass. Boxes without weights are white. All numbers are those of `config`; the sum
    of the weights is its `num_parameters`. Raises PictureError for anything but a ModelConfig.
    """

    def __init__(self, config: ModelConfig, *, title: str | None = None):
        self.config = check_kind("config", config, ModelConfig, error=PictureError)
        self.stages, self.title = stages(config), title
        self._height = ROW * (len(self._all()) + 4.4)

    def _all(self) -> list[Stage]:
        return [stage for part in self.stages.values() for stage in part]

    @property
    def layer_weights(self) -> int:
        """Weights of one layer."""
        return sum(stage.weights for stage in self.stages["layer"])

    @property
    def num_weights(self) -> int:
        """Weights of the whole model."""
        outside = sum(stage.weights for part in ("before", "after") for stage in self.stages[part])
        return self.config.num_hidden_layers * self.layer_weights + outside

    def _sums(self) -> list[tuple[str, str]]:
        layers = self.config.num_hidden_layers
        outside = self.num_weights - layers * self.layer_weights
        return [
            ("one layer", f"{self.layer_weights:,}"),
            ("the model", f"{layers} × {self.layer_weights:,} + {outside:,} = {self.num_weights:,}"),
        ]

    def text(self) -> str:
        rows = []
        for part, stages_ in self.stages.items():
            inset = "  " if part == "layer" else ""
            if inset:
                rows.append([f"{self.config.num_hidden_layers} layers:", "", ""])
            rows += [[inset + ", ".join(stage.names), stage.shape, _counted(stage)] for stage in stages_]
        sums = "\n".join(f"{name}: {count} weights" for name, count in self._sums())
        return f"{text_table(['part', 'comes out', 'weights'], rows)}\n{sums}"

    def alt(self) -> str:
        names = ", ".join(" ".join(stage.names) for stage in self.stages["layer"] if not stage.is_sum)
        sizes = f"{self.layer_weights:,} weights in a layer, {self.num_weights:,} in {self.config.num_hidden_layers}"
        return f"{self.title or 'A decoder layer'}: {names}; {sizes} layers, embedding and LM head"

    def _draw(self, axes, step: int | None = None) -> None:
        self._empty(axes)
        _write(axes, 0.1, 0.4 * ROW, "T: tokens of the pass; white: no weights", color=GREY)
        _write(axes, SHAPE, 0.4 * ROW, "output shape", color=GREY)
        _write(axes, COUNT, 0.4 * ROW, "weights", ha="right", color=GREY)
        ways, y = {}, 1.4 * ROW
        for part, stages_ in self.stages.items():
            ways[part] = [y + place * ROW for place in range(len(stages_))]
            y = ways[part][-1] + 1.6 * ROW
        self._draw_frame(axes, ways["layer"])
        every = list(zip(self._all(), (y for part in ways.values() for y in part), strict=True))
        for (stage, above), (following, below) in pairwise(every):
            _draw_arrow(axes, ((SPINE, above + stage.half), (SPINE, below - following.half)))
        for stage, place in every:
            self._draw_stage(axes, stage, place)
        for line, (name, count) in enumerate(self._sums()):
            _write(axes, WHAT, y + (0.9 * line - 0.2) * ROW, name, weight="bold")
            _write(axes, COUNT, y + (0.9 * line - 0.2) * ROW, count, ha="right", weight="bold")

    def _draw_frame(self, axes, ways: Sequence[float]) -> None:
        """Draw a frame around the layer, with the residual around each half."""
        top, bottom = ways[0] - 0.92 * ROW, ways[-1] + 0.62 * ROW
        _draw_box(axes, (0.1, top, WIDTH - 0.2, bottom - top), WHITE, edge=GREY, line=1.0)
        begin = ways[0]
        for y, following, stage in zip(ways, [*ways[1:], 0.0], self.stages["layer"], strict=True):
            if stage.is_sum:
                start = begin - 0.6 * ROW
                _draw_arrow(axes, ((SPINE, start), (AROUND, start), (AROUND, y), (SPINE - stage.half, y)))
                begin = following
        layers = f"× {self.config.num_hidden_layers} layers"
        _write(axes, 0.25, (top + bottom) / 2, layers, rotation=90, ha="center", color=GREY)

    def _draw_stage(self, axes, stage: Stage, y: float) -> None:
        fill = PART_COLORS[1] if stage.product else WHITE
        if stage.is_sum:
            place = SPINE - stage.half, y - stage.half, 2 * stage.half, 2 * stage.half
            _draw_box(axes, place, WHITE, edge=GREY, line=0.8, corner=stage.half)
            _write(axes, SPINE, y, "+", ha="center")
        else:
            for left, width, name in _places(stage.names):
                _draw_box(axes, (left, y - stage.half, width, 2 * stage.half), fill, edge=GREY, line=0.8)
                _write(axes, left + width / 2, y, name, ha="center", weight="bold")
        _write(axes, WHAT, y, stage.what)
        _write(axes, SHAPE, y, stage.shape)
        _write(axes, COUNT, y, _counted(stage), ha="right")


def _counted(stage: Stage) -> str:
    """ "128 × 256 = 32,768"; only the number if there is no product, or one that is too long."""
    count = f"{stage.weights:,}"
    if not stage.weights or stage.product == count:
        return stage.product
    whole = f"{stage.product} = {count}"
    return whole if len(whole) <= MOST_SIGNS else count


def _places(names: Sequence[str]) -> Iterator[tuple[float, float, str]]:
    """Left end and width of the box of each name; together they are as wide as one box."""
    gap = 0.06
    width = (BOX_WIDTH - gap * (len(names) - 1)) / len(names)
    for place, name in enumerate(names):
        yield BOX_LEFT + place * (width + gap), width, name


# --- drawing ---------------------------------------------------------------------------------------------------------


def _draw_box(axes, place: tuple[float, float, float, float], fill: str, *, edge: str, line: float, corner=0.07):
    from matplotlib.patches import FancyBboxPatch

    x, y, width, height = place
    style = f"round,pad=0,rounding_size={corner}" if corner else "square,pad=0"
    look = {"facecolor": fill, "edgecolor": edge, "linewidth": line, "boxstyle": style}
    box = axes.add_artist(FancyBboxPatch((x, y), width, height, **look))
    box.set_in_layout(False)
    return box


def _draw_arrow(axes, points: Sequence[Point]) -> None:
    """Draw a line through the points, with an arrow's head at the last."""
    axes.plot(*zip(*points[:-1], strict=True), color=GREY, linewidth=1.2, solid_capstyle="butt", zorder=1)
    style = {"arrowstyle": "-|>", "color": GREY, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=style, zorder=1).set_in_layout(False)


def _write(axes, x: float, y: float, words: str, **style):
    style = {"va": "center", "size": SMALL_SIZE, "color": BLACK} | style
    text = axes.text(x, y, words, **style)
    text.set_in_layout(False)
    return text


def _beside(axes, other, points: float, words: str, **style):
    """To the right of another text, on its line."""
    style = {"va": "center", "size": SMALL_SIZE, "in_layout": False} | style
    return axes.annotate(words, (1, 0.5), (points, 0), xycoords=other, textcoords="offset points", **style)
