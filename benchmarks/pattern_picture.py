"""Draws the pattern of dilated attention from the integers that the layer itself computes with.

    python benchmarks/pattern_picture.py [--segments 8 16 32] [--rates 1 2 4] [--picture FILE] [--help]

Left, for every branch and key-value head: the tokens that it has (pale), and of these the keys that one token
reads (dark). Right, for every pair of tokens: how many branches of how many heads read it in one layer, and
which pairs are connected by two layers, one after the other. Nothing is measured. The numbers stand beside
the picture as JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megaplug.errors import UserError
from megaplug.layers.attention.given import whole
from megaplug.layers.attention.pattern import Branch, Heads, branches, head_sets, num_rows
from megaplug.plan.pictures import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "dilated_pattern.png"


@dataclass(frozen=True)
class Drawn:
    """What is drawn: the pattern of a layer with as many query heads as key-value heads, causal."""

    num_tokens: int
    num_groups: int
    pattern: tuple[Branch, ...]
    offset: str = "kv_group"

    def rows(self, branch: Branch, offset: int) -> list[list[int]]:
        """The tokens that a head of that offset has, for each segment."""
        return [
            [
                begin + offset + row * branch.rate
                for row in range(
                    num_rows(min(branch.segment_length, self.num_tokens - begin), offset, branch.rate)
                )
            ]
            for begin in range(0, self.num_tokens, branch.segment_length)
        ]

    def offsets(self, branch: Branch) -> dict[int, int]:
        """The offset of each key-value head."""
        return {
            group: heads.offset
            for heads in head_sets(Heads(self.num_groups, self.num_groups), self.offset, branch.rate)
            for group in range(self.num_groups)[heads.groups.slice]
        }

    def reads(self) -> np.ndarray:
        """``[branch, group, query, key]``: whether the query reads the key there."""
        size = (len(self.pattern), self.num_groups, self.num_tokens, self.num_tokens)
        found = np.zeros(size, dtype=bool)
        for number, branch in enumerate(self.pattern):
            for group, offset in self.offsets(branch).items():
                for tokens in self.rows(branch, offset):
                    found[number, group][np.ix_(tokens, tokens)] = True
        return np.tril(found)


def draw(drawn: Drawn, token: int, png: Path) -> Path:
    """The picture of both."""
    reads = drawn.reads()
    figure = canvas.new_figure(13, 5.6)
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    lanes = left.subplots(len(drawn.pattern), 1, sharex=True, squeeze=False)[:, 0]
    for number, (axes, branch) in enumerate(zip(lanes, drawn.pattern, strict=True)):
        _lane(axes, drawn, branch, reads[number], token)
    lanes[-1].set_xlabel(f"token; dark: the keys that token {token} reads")
    one, two = right.subplots(1, 2)
    count = reads.sum((0, 1))
    reached = (count > 0).astype(int)
    _square(one, count, "one layer: how often a pair is read")
    _square(two, np.minimum(reached @ reached, 1), "two layers: what is connected")
    canvas.titled(
        figure,
        "Dilated attention, as the layer computes it",
        f"{drawn.num_tokens} tokens, {drawn.num_groups} key-value heads, offset {drawn.offset}; causal; "
        "counted from the pattern",
    )
    return canvas.save(figure, png, numbers(drawn, token))


def numbers(drawn: Drawn, token: int) -> dict[str, Any]:
    """What the picture shows."""
    reads = drawn.reads()
    count = reads.sum((0, 1))
    reached = (count > 0).astype(int)
    return {
        "picture": "dilated_pattern",
        "label": "counted",
        "tokens": drawn.num_tokens,
        "offset": drawn.offset,
        "branches": [
            {
                "segment_length": branch.segment_length,
                "rate": branch.rate,
                "tokens_of_each_head": [
                    sorted(set[int]().union(*drawn.rows(branch, offset)))
                    for _, offset in sorted(drawn.offsets(branch).items())
                ],
            }
            for branch in drawn.pattern
        ],
        "token": token,
        "keys_of_token": [
            [np.flatnonzero(of_group[token]).tolist() for of_group in of_branch] for of_branch in reads
        ],
        "pairs_in_one_layer": int(reached.sum()),
        "pairs_in_two_layers": int((reached @ reached > 0).sum()),
        "pairs_of_dense_attention": drawn.num_tokens * (drawn.num_tokens + 1) // 2,
    }


def _lane(axes: Axes, drawn: Drawn, branch: Branch, reads: np.ndarray, token: int) -> None:
    offsets = drawn.offsets(branch)
    for group in range(drawn.num_groups):
        has = sorted(set[int]().union(*drawn.rows(branch, offsets[group])))
        axes.broken_barh([(each + 0.08, 0.84) for each in has], (group - 0.4, 0.8), color="#cfe3f3")
        keys = np.flatnonzero(reads[group, token])
        axes.broken_barh([(each + 0.08, 0.84) for each in keys], (group - 0.4, 0.8), color=canvas.BLUE)
    for border in range(0, drawn.num_tokens + 1, branch.segment_length):
        axes.axvline(border, color=canvas.VERMILION, linewidth=1)
    axes.set(
        title=f"segments of {branch.segment_length}, rate {branch.rate}",
        xlim=(-0.2, drawn.num_tokens + 0.2),
        ylim=(drawn.num_groups - 0.4, -0.6),
        yticks=range(drawn.num_groups),
        yticklabels=[f"head {group}, offset {offsets[group]}" for group in range(drawn.num_groups)],
    )
    axes.title.set_fontsize(9)
    axes.tick_params(labelsize=8, colors=canvas.INK, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _square(axes: Axes, values: np.ndarray, title: str) -> None:
    axes.imshow(np.ma.masked_equal(values, 0), cmap="Blues", vmin=-0.6 * values.max(), vmax=values.max())
    axes.set(xlabel="key", ylabel="query")
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8, colors=canvas.INK)


def standard() -> tuple[Drawn, int]:
    """What docs/long_context.md shows."""
    return Drawn(32, 4, branches([8, 16, 32], [1, 2, 4])), 28


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    drawn, token = standard()
    parser.add_argument("--tokens", type=int, default=drawn.num_tokens)
    parser.add_argument("--groups", type=int, default=drawn.num_groups, help="key-value heads")
    parser.add_argument(
        "--segments", type=int, nargs="+", default=[branch.segment_length for branch in drawn.pattern]
    )
    parser.add_argument("--rates", type=int, nargs="+", default=[branch.rate for branch in drawn.pattern])
    parser.add_argument(
        "--offset", choices=("kv_group", "query_head", "torchscale_block"), default="kv_group"
    )
    parser.add_argument("--token", type=int, default=token, help="whose keys are dark")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    return parser.parse_args(arguments)


def drawn_of(options: argparse.Namespace) -> Drawn:
    """What the options ask for.

    Raises:
        UserError: It cannot be drawn.
    """
    tokens, groups = whole("--tokens", options.tokens), whole("--groups", options.groups)
    if not 0 <= options.token < tokens:
        raise UserError(
            f"--token is {options.token}, and there are {tokens} tokens",
            hint=f"give one of 0 to {tokens - 1}",
        )
    return Drawn(tokens, groups, branches(options.segments, options.rates), options.offset)


def main() -> None:
    """Parse and draw."""
    options = parse()
    try:
        drawn = drawn_of(options)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"wrote {draw(drawn, options.token, options.picture)}")


if __name__ == "__main__":
    main()
