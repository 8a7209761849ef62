"""The least time of a decode step against the batch size: weights, arithmetic, cache, and which takes longest."""

from collections.abc import Mapping, Sequence

from minillm.costs import Card
from minillm.model import ModelConfig
from minillm.viz.base import SMALL_SIZE, PictureError, literal, number, plural, text_table
from minillm.viz.curves import Curves, Look
from minillm.viz.palette import BLACK, GREY, LIGHT_GREY, SERIES_COLORS

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
WEIGHTS, ARITHMETIC, CACHE = "reading the weights", "arithmetic", "reading the cache"
LEAST, MEASURED = "least time", "measured"


class DecodeRoofline(Curves):
    """Least milliseconds of a decode step of B requests with `context` cached tokens each, both axes logarithmic.

    The three parts are dashed: reading the weights does not depend on B, arithmetic and the cache grow with it. The
    thick line, `costs.decode_seconds`, is the larger of the first two plus the cache. Right of the vertical line
    arithmetic takes longer than the weights. `card` holds the ceilings, from a data sheet or measured. `measured` maps
    a batch size to the measured seconds of a step. At `marked` batch sizes the line is labelled with tokens per second.
    Batches whose weights and caches do not fit the card are grey. Raises PictureError for batches or measured times
    that are not above 0, or a context below 0.
    """

    _title_pad = 22

    def __init__(
        self,
        config: ModelConfig,
        card: Card,
        context: int,
        batches: Sequence[int] = BATCHES,
        *,
        measured: Mapping[int, float] | None = None,
        marked: Sequence[int] = (),
        dtype_bytes: int = 2,
        title: str | None = None,
    ):
        from minillm.costs import (  # they import torch
            compute_bound_batch,
            kv_bytes_per_token,
            matmul_parameters,
            tokenwise_flops,
            what_fits,
        )

        self.measured, self.marked = dict(measured or {}), sorted(set(marked))
        self.batches = sorted({*batches, *self.measured})
        if not self.batches or min(*self.batches, *self.marked, 1) < 1 or context < 0:
            raise PictureError(
                f"batches {self.batches + self.marked}, context {context}: give batches from 1 and a context from 0 on"
            )
        self.config, self.dtype_bytes = config, dtype_bytes
        self.card, self.context, self.compute_bound = card, context, compute_bound_batch(card, dtype_bytes)
        self.kv_bytes = kv_bytes_per_token(config, dtype_bytes)
        self.weight_bytes = matmul_parameters(config) * dtype_bytes
        fit = what_fits(config, card.memory_bytes, dtype_bytes=dtype_bytes, reserved_share=0)
        self.most_requests = fit.num_requests(context) if context else None  # None: without caches, any number fits
        parts = {
            WEIGHTS: [self.weight_bytes / card.bandwidth for _ in self.batches],
            ARITHMETIC: [tokenwise_flops(config, batch, batch) / card.flops for batch in self.batches],
        }
        if context:
            parts[CACHE] = [batch * context * self.kv_bytes / card.bandwidth for batch in self.batches]
        parts[LEAST] = [self.seconds(batch) for batch in self.batches]
        if self.measured:
            parts[MEASURED] = [self.measured.get(batch) for batch in self.batches]
        series = {name: [value and 1000 * value for value in values] for name, values in parts.items()}
        super().__init__(
            self.batches, series, "requests in the batch", "milliseconds per decode step",
            kinds={name: MEASURED if name == MEASURED else "predicted" for name in series},
            log_x=True, log_y=True, title=title,
        )  # fmt: skip
        self.looks[LEAST] = Look(SERIES_COLORS.index(BLACK), dashed=True, thick=True)

    def seconds(self, batch: int) -> float:
        """The least time of a step."""
        from minillm.costs import decode_seconds

        return decode_seconds(self.config, self.card, self.context, batch, self.dtype_bytes)

    # --- words ---

    def most_tokens(self, batch: int) -> str:
        """Tokens per second at most."""
        return f"{batch / self.seconds(batch):,.0f}"

    def cache_bound(self) -> int | None:
        """The smallest batch whose cache takes at least as long as the weights; None without a context."""
        return -(-self.weight_bytes // (self.context * self.kv_bytes)) if self.context else None

    def longest(self, index: int) -> str:
        """The part that takes longest at each batch of `batches`."""
        parts = {name: self.series[name][index] for name in (WEIGHTS, ARITHMETIC, CACHE) if name in self.series}
        return max(parts, key=parts.__getitem__)

    def summary(self) -> str:
        """Where the parts cross."""
        last = self.compute_bound - 1
        words = [f"up to {plural(last, 'request')}, reading the weights takes longer than arithmetic"]
        if self.context:
            words.append(f"from {self.cache_bound():,} on, reading {self.context:,} cached tokens each does")
            words.append(f"more than {self.most_requests:,} do not fit into the card's memory")
        return "; ".join(words)

    def fits(self, batch: int) -> bool:
        """Whether the weights and the caches of `batch` requests fit the card's memory, without anything else."""
        return self.most_requests is None or batch <= self.most_requests

    def text(self) -> str:
        names = [name for name in self.series if name != MEASURED]
        header = ["batch", *names, "tokens/s at most", "longest part"]
        rows = []
        for index, batch in enumerate(self.batches):
            row = [f"{batch:,}", *(f"{self.series[name][index]:,.3f}" for name in names)]
            rows.append([*row, self.most_tokens(batch) if self.fits(batch) else "no room", self.longest(index)])
            if self.measured:
                rows[-1] += self._measured_cells(index)
        header += ["measured", "of the limit"] if self.measured else []
        marks = [self._mark(batch) for batch in self.marked]
        return "\n".join([f"{self.y_label}, {self.card.name}", text_table(header, rows), *marks, self.summary()])

    def _mark(self, batch: int) -> str:
        return f"{plural(batch, 'request')}: {self.most_tokens(batch)} tokens/s"

    def _measured_cells(self, index: int) -> list[str]:
        """The measured time, and its share of the highest possible speed."""
        seconds = self.measured.get(self.batches[index])
        if seconds is None:
            return ["–", "–"]
        return [f"{1000 * seconds:,.3f}", f"{self.series[LEAST][index] / (1000 * seconds):.0%}"]

    def alt(self) -> str:
        return f"{self.title or self.y_label}: {self.summary()}"

    # --- figure ---

    def _draw(self, axes, step: int | None = None) -> None:
        super()._draw(axes, step)
        if self._turns():  # the thick line bends there, between two batches of the table
            batches = sorted({*self.batches, self.compute_bound})
            line = next(line for line in axes.lines if line.get_label() == LEAST)
            line.set_data(batches, [1000 * self.seconds(batch) for batch in batches])
        self._draw_what_does_not_fit(axes)
        for batch in self.marked:
            place = batch, 1000 * self.seconds(batch)
            axes.plot(*place, "o", color=BLACK, markersize=6)
            axes.annotate(
                literal(self._mark(batch)), place, (-4, 7),
                textcoords="offset points", size=SMALL_SIZE,
                ha="right" if batch > self.batches[0] else "left",
            )  # fmt: skip

    def _draw_what_does_not_fit(self, axes) -> None:
        end = axes.get_xlim()[1]
        if self.fits(self.batches[-1]):
            return
        axes.axvspan(max(self.most_requests, axes.get_xlim()[0]), end, facecolor=LIGHT_GREY, alpha=0.85, zorder=3)
        axes.annotate(
            literal(f"more than {self.most_requests:,}: no room "), (end, 1), (-3, -4), ha="right", va="top",
            xycoords=("data", "axes fraction"), textcoords="offset points", rotation=90, size=SMALL_SIZE,
        )  # fmt: skip

    def _turns(self) -> bool:
        return self.batches[0] < self.compute_bound < self.batches[-1]

    def _draw_marks(self, axes) -> None:
        """Mark where arithmetic begins to take longer than the weights, if that is in the picture, and name both
        sides."""
        if not self._turns():
            return
        last = self.compute_bound - 1
        self._draw_sides(axes, last, "weights longer", "arithmetic longer")
        axes.annotate(
            number(last), (last, 0), (3, 4), xycoords=("data", "axes fraction"),
            textcoords="offset points", color=GREY, size=SMALL_SIZE,
        )  # fmt: skip
