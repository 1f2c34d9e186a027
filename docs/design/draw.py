"""Draw polyak's packages and their imports: ``python docs/design/draw.py`` writes ``docs/assets/architecture.svg``.

Everything in the picture comes from the code: the rows are the layers that import-linter enforces (pyproject.toml), the
words the first line of each package, the arrows the imports that no longer path implies.
"""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from itertools import chain
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "polyak"
PICTURE = ROOT / "docs" / "assets" / "architecture.svg"
_BOX, _HIGH, _GAP, _ROW = 228, 84, 16, 132
_STYLE = """
text { font-family: system-ui, sans-serif; font-size: 12px; fill: #333 }
text.name { font-weight: 600; font-size: 14px; fill: #111 }
rect { fill: #f5f7fb; stroke: #5b6b8c }
path { fill: none; stroke: #8a94a8; stroke-width: 1.2 }
"""


def layers() -> list[list[str]]:
    """Return the packages of each layer, the highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (rows,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    named = [[name.strip(" ()") for name in row.split("|")] for row in rows]
    return [row for row in named if row != ["__main__"]]


def imports(package: str) -> set[str]:
    """Return the packages of polyak that one of them imports, wherever in its code; not for types alone."""
    path = PACKAGE / package
    files = [*path.rglob("*.py")] if path.is_dir() else [path.with_suffix(".py")]
    found: set[str] = set()
    for file in files:
        for node in ast.walk(_without_types(ast.parse(file.read_text(encoding="utf-8")))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("polyak."):
                found.add(str(node.module).split(".")[1])
    return found - {package}


def _without_types(tree: ast.Module) -> ast.Module:
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    return tree


def arrows() -> list[tuple[str, str]]:
    """Return the imports that no path of other imports implies."""
    direct = {name: imports(name) & {*chain(*layers())} for name in chain(*layers())}
    below: dict[str, set[str]] = {}
    for name in reversed([*chain(*layers())]):
        below[name] = direct[name].union(*(below.get(other, set()) for other in direct[name]))
    return [
        (name, other)
        for name, others in direct.items()
        for other in sorted(others)
        if not any(other in below[between] for between in others - {other})
    ]


def _first_line(package: str) -> str:
    file = PACKAGE / package / "__init__.py" if (PACKAGE / package).is_dir() else PACKAGE / f"{package}.py"
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return re.sub(r"``?|\.$", "", docstring.splitlines()[0])


def drawn() -> str:
    """Return the picture as SVG."""
    rows = layers()
    width = max(len(row) for row in rows) * (_BOX + _GAP) + _GAP
    places = {
        name: ((width - len(row) * (_BOX + _GAP) + _GAP) // 2 + i * (_BOX + _GAP), _GAP + _ROW * number)
        for number, row in enumerate(rows)
        for i, name in enumerate(row)
    }
    height = _ROW * len(rows)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>The packages of polyak: each imports only from rows below it</title>",
        f"<style>{_STYLE}</style>",
        f'<rect width="{width}" height="{height}" style="fill: white; stroke: none"/>',
    ]
    for name, other in arrows():
        (x, y), (to_x, to_y) = places[name], places[other]
        start, end, middle = x + _BOX // 2, to_x + _BOX // 2, (y + _HIGH + to_y) // 2
        lines.append(f'<path d="M {start} {y + _HIGH} C {start} {middle} {end} {middle} {end} {to_y}"/>')
    for name, (x, y) in places.items():
        lines.append(f'<rect x="{x}" y="{y}" width="{_BOX}" height="{_HIGH}" rx="6"/>')
        lines.append(f'<text class="name" x="{x + 10}" y="{y + 20}">{name}</text>')
        for number, text in enumerate(textwrap.wrap(_first_line(name), 34)[:3]):
            lines.append(f'<text x="{x + 10}" y="{y + 39 + 16 * number}">{escape(text)}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(drawn(), encoding="utf-8")
