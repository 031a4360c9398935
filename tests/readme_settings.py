"""The README's table of settings, made from settings.py: `python tests/readme_settings.py` prints it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobsys.settings import Settings

DURATIONS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


def shown(name: str, value: Any) -> str:
    """A default as one would write it into the environment."""
    annotation = str(Settings.model_fields[name].annotation)
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return "`1`" if value else "`0`"
    if isinstance(value, tuple):
        return f"`{value[0]}/minute`" if value[1] == 60 else f"`{value[0]}/{value[1]:g}s`"
    if isinstance(value, float) and "float" in annotation:
        unit, size = next((unit, size) for unit, size in DURATIONS if value >= size and value % size == 0)
        return f"`{value / size:g}{unit}`"
    return f"`{value}`" if not isinstance(value, Path) else f"`./{value}`"


def table() -> str:
    """The table in Markdown."""
    rows = [f"| `{name.upper()}` | {shown(name, field.default)} | {field.description} |" for name, field in Settings.model_fields.items()]
    return "\n".join(["| variable | default | what it is |", "| --- | --- | --- |", *rows])


if __name__ == "__main__":
    print(table())
