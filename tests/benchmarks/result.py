"""What a part found, and how it is printed: one JSON object, or a Markdown table with the ratios first."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

SMALLER_IS_BETTER = ("ms", "MB", "times the buffers", "times what it was")


@dataclass
class Result:
    """A part's numbers, all medians in `unit`; `floor` is None where there is none, and `runs` has what they are the medians of."""

    unit: str
    jobsys: float
    floor: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of_runs(cls, unit: str, runs: dict[str, list[float]], **details: Any) -> Result:
        """The medians of runs named `jobsys`, `floor`, and else after a peer."""
        middle = {name: median(values) for name, values in runs.items()}
        peers = {name: value for name, value in middle.items() if name not in ("jobsys", "floor")}
        return cls(unit, middle["jobsys"], middle.get("floor"), peers, details, runs)

    def as_json(self, name: str) -> dict[str, Any]:
        """The object `--json` prints."""
        return rounded({"name": name, **asdict(self)})

    def as_row(self, name: str) -> str:
        """The line of the Markdown table. A ratio above 1 says that jobsys does better."""
        best = (min if self.unit in SMALLER_IS_BETTER else max)(self.peers.values(), default=None)
        values = [f"{peer} {shown(value)}" for peer, value in sorted(self.peers.items())]
        cells = [name, self._ratio(self.floor), self._ratio(best), f"{shown(self.jobsys)} {self.unit}"]
        return "| " + " | ".join([*cells, shown(self.floor), ", ".join(values)]) + " |"

    def _ratio(self, other: float | None) -> str:
        if not other or not self.jobsys:
            return ""
        return f"{other / self.jobsys if self.unit in SMALLER_IS_BETTER else self.jobsys / other:.2f}"


TABLE_HEAD = "| | jobsys / floor | jobsys / best peer | jobsys | floor | peers |\n| --- | ---: | ---: | ---: | ---: | --- |"


def percentiles(values: list[float], *shares: int) -> dict[str, float]:
    """The percentiles asked for, as `{"p50": …}`."""
    ordered = sorted(values)
    return {f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in shares}


def shown(value: float | None) -> str:
    """A number for people."""
    return "" if value is None else f"{value:,.{0 if abs(value) >= 100 else 2}f}"


def rounded(value: Any) -> Any:
    """The same with floats of at most four decimals, however deep."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
