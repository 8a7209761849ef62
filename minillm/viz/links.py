"""Several cards and the link between them: the time of a decode step by how they share the work; an all-reduce."""

from collections.abc import Sequence

from minillm.costs import Card
from minillm.errors import ConfigError
from minillm.model import ModelConfig
from minillm.viz.base import SMALL_SIZE, Picture, PictureError, number, plural, text_table
from minillm.viz.curves import Curves, Look
from minillm.viz.palette import BLACK, GREY, PART_COLORS, SERIES_COLORS, ink_on

BATCHES = (2, 4, 8, 16, 32, 64, 128, 256, 512)
REPLICAS = "a replica each"


class LinkRoofline(Curves):
    """Least milliseconds of a decode step of B requests on several cards, both axes logarithmic: all is computed.

    Thick: each card holds the whole model and serves its share of the requests. The others: the cards hold one model
    together, joined by one of `links` (by default `costs.LINKS`). `pays` says up to how many requests that is faster.
    Every request has `context` cached tokens. Raises PictureError for fewer than two cards or batches below their
    number, or links of one name.
    """

    def __init__(
        self,
        config: ModelConfig,
        card: Card,
        context: int,
        num_cards: int = 2,
        links: Sequence | None = None,
        batches: Sequence[int] = BATCHES,
        *,
        title: str | None = None,
    ):
        from minillm.costs import LINKS, decode_seconds, tensor_parallel_pays_up_to, tensor_parallel_seconds

        self.links = {link.name: link for link in (LINKS if links is None else links)}
        self.batches = sorted(set(batches))
        if num_cards < 2 or not self.batches or self.batches[0] < num_cards or any(b % num_cards for b in self.batches):
            raise PictureError(
                f"{num_cards} cards, batches {self.batches}: give at least 2 cards, and batches that they share evenly"
            )
        if not self.links or (links is not None and len(self.links) < len(links)):
            raise PictureError(f"the links are {list(self.links)}; give at least one, and each a name of its own")
        self.config, self.card, self.context, self.num_cards = config, card, context, num_cards
        series = {REPLICAS: [1e3 * decode_seconds(config, card, context, batch // num_cards) for batch in self.batches]}
        for name, link in self.links.items():
            series[f"one model, {name}"] = [
                1e3 * tensor_parallel_seconds(config, card, link, num_cards, batch, batch, *2 * [batch * context])
                for batch in self.batches
            ]
        self.pays = {
            name: tensor_parallel_pays_up_to(config, card, link, context, num_cards, self.batches[-1])
            for name, link in self.links.items()
        }
        super().__init__(
            self.batches, series, f"requests on {num_cards} cards together", "milliseconds per decode step",
            kinds=dict.fromkeys(series, "predicted"), log_x=True, log_y=True, thick=REPLICAS, title=title,
        )  # fmt: skip
        self.looks[REPLICAS] = Look(SERIES_COLORS.index(BLACK), dashed=True, thick=True)
        self.looks |= {name: Look(index, dashed=True) for index, name in enumerate(list(series)[1:])}

    def summary(self) -> str:
        """Up to how many requests one model on all cards is faster than a replica on each."""
        words = []
        for name, most in self.pays.items():
            if most == 0:
                words.append(f"{name}: never")
            elif most >= self.batches[-1]:
                words.append(f"{name}: at all these sizes")
            else:
                words.append(f"{name}: up to {plural(most, 'request')}")
        return f"one model on {self.num_cards} cards is faster than replicas over " + "; over ".join(words)

    def text(self) -> str:
        header = ["requests", *self.series]
        rows = [
            [f"{batch:,}", *(f"{values[index]:,.2f}" for values in self.series.values())]
            for index, batch in enumerate(self.batches)
        ]
        return "\n".join(
            [f"{self.y_label}, {self.num_cards} x {self.card.name}", text_table(header, rows), self.summary()]
        )

    def alt(self) -> str:
        return f"{self.title or self.y_label}: {self.summary()}"

    def _draw(self, axes, step: int | None = None) -> None:
        super()._draw(axes, step)
        for index, (name, most) in enumerate(self.pays.items()):
            if 0 < most < self.batches[-1]:
                color = self.looks[f"one model, {name}"].color
                share = 1e3 * self._replica_seconds(most)
                axes.plot(most, share, "o", color=color, markersize=6, zorder=4)
                axes.annotate(
                    f"{most:,}", (most, share), (4, -11 - 2 * index), color=color,
                    textcoords="offset points", size=SMALL_SIZE,
                )  # fmt: skip

    def _replica_seconds(self, batch: int) -> float:
        from minillm.costs import decode_seconds

        return decode_seconds(self.config, self.card, self.context, batch // self.num_cards)


CELL, BETWEEN = 0.27, 0.3  # inches: of a piece; from round to round


class AllReduceRounds(Picture):
    """How the sums of an all-reduce grow: after each round a grid, a row for each rank, a column for each piece.

    A number says over how many ranks this piece is summed there; a frame, that it came in this round. `plan` is what
    `costs.follow_plan` takes. Raises PictureError for a plan that it refuses, or without a round.
    """

    def __init__(self, plan: Sequence, num_ranks: int, *, title: str | None = None):
        from minillm.costs import follow_plan

        try:
            self.states = follow_plan(plan, num_ranks)
        except ConfigError as error:
            raise PictureError(str(error)) from error
        if len(self.states) < 2:
            raise PictureError("the plan has no round; give at least one")
        self.num_ranks, self.title = num_ranks, title
        self.counts = [[[len(terms) for terms in pieces] for pieces in held] for held in self.states]

    def text(self) -> str:
        header = ["", "begin", *(f"round {number}" for number in range(1, len(self.counts)))]
        rows = [
            [f"rank {rank}", *(" ".join(map(number, counts[rank])) for counts in self.counts)]
            for rank in range(self.num_ranks)
        ]
        return text_table(header, rows)

    def alt(self) -> str:
        last = [count for pieces in self.counts[-1] for count in pieces]
        whole = f"{last.count(self.num_ranks)} of {len(last)} pieces are whole sums"
        title = self.title or f"An all-reduce over {self.num_ranks} ranks"
        return f"{title}: after {plural(len(self.counts) - 1, 'round')} {whole}"

    def _width_of_one(self) -> float:
        return CELL * self.num_ranks + BETWEEN

    def _size(self) -> tuple[float, float]:
        return 0.6 + self._width_of_one() * len(self.counts), CELL * self.num_ranks + 0.55

    def _draw(self, axes, step: int | None = None) -> None:
        axes.set(xlim=(0, self._width_of_one() * len(self.counts)), ylim=(CELL * self.num_ranks + 0.02, -0.3))
        axes.set_aspect("equal")
        axes.spines[:].set_visible(False)
        axes.set_xticks([])
        axes.set_yticks([CELL * (rank + 0.5) for rank in range(self.num_ranks)])
        axes.set_yticklabels([f"rank {rank}" for rank in range(self.num_ranks)])
        axes.tick_params(axis="y", length=0)
        for index, counts in enumerate(self.counts):
            left = index * self._width_of_one()
            words = f"round {index}" if index else "begin"
            axes.annotate(
                words, (left + CELL * self.num_ranks / 2, -0.1), ha="center", size=SMALL_SIZE, color=GREY,
                annotation_clip=False,
            )  # fmt: skip
            for rank, pieces in enumerate(counts):
                for piece, count in enumerate(pieces):
                    came = index > 0 and self.states[index - 1][rank][piece] != self.states[index][rank][piece]
                    self._draw_cell(axes, left + piece * CELL, rank * CELL, count, came)

    def _draw_cell(self, axes, x: float, y: float, count: int, came: bool) -> None:
        from matplotlib.patches import Rectangle

        shade = round((len(PART_COLORS) - 1) * (count - 1) / max(1, self.num_ranks - 1))
        color = PART_COLORS[shade]
        edge = {"edgecolor": BLACK, "linewidth": 1.6, "zorder": 3} if came else {"edgecolor": GREY, "linewidth": 0.4}
        axes.add_patch(Rectangle((x, y), CELL, CELL, facecolor=color, **edge))
        axes.annotate(
            str(count), (x + CELL / 2, y + CELL / 2), ha="center", va="center", size=SMALL_SIZE,
            color=ink_on(color), zorder=4,
        )  # fmt: skip
