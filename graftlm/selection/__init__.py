"""SELECTORS: the table of every way of choosing rows. A new one is its file, its line here, and its test."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graftlm.selection import (
    cluster,
    dedup,
    diversity,
    ifd,
    judge,
    k_center,
    length,
    less,
    longest,
    perplexity,
    rds,
    reversed_ifd,
)
from graftlm.selection import format as by_format
from graftlm.selection.base import Pool, Scores, SelectorConfig


@dataclass(frozen=True)
class Selector:
    """A row of the table: the config that names the method, and its function from a pool to scores."""

    config: type[SelectorConfig]
    score: Callable[[Any, Pool], Scores]
    filters: bool = False
    """It only leaves rows out and ranks none, so it needs no `keep`."""


SELECTORS: dict[str, Selector] = {
    "cluster": Selector(cluster.ClusterConfig, cluster.score),
    "dedup": Selector(dedup.DedupConfig, dedup.score, filters=True),
    "diversity": Selector(diversity.DiversityConfig, diversity.score),
    "format": Selector(by_format.FormatConfig, by_format.score, filters=True),
    "ifd": Selector(ifd.IfdConfig, ifd.score),
    "judge": Selector(judge.JudgeConfig, judge.score),
    "k-center": Selector(k_center.KCenterConfig, k_center.score),
    "length": Selector(length.LengthConfig, length.score, filters=True),
    "less": Selector(less.LessConfig, less.score),
    "longest": Selector(longest.LongestConfig, longest.score),
    "perplexity": Selector(perplexity.PerplexityConfig, perplexity.score),
    "rds": Selector(rds.RdsConfig, rds.score),
    "reversed-ifd": Selector(reversed_ifd.ReversedIfdConfig, reversed_ifd.score),
}
