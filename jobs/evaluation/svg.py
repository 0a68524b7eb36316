"""A matplotlib figure as SVG inside a page: no files, no fonts, no colours of its own.

Figures are drawn in pixels, in the colours named here; the page's style sheet says what each is in
its light and its dark scheme. Text stays text, in the page's font.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = {
    name: f"#0a0b{number:02x}"
    for number, name in enumerate(
        ("ink", "muted", "rule", "band", "paper", "blue", "green", "orange", "violet", "rose")
    )
}
"""What to pass to matplotlib for each colour; in the page it is the CSS variable of that name."""

FONT_SIZE = 12
_NAMES = {code: name for name, code in COLOURS.items()}


@contextmanager
def drawing(width: int, height: int) -> Iterator[Figure]:
    """Give an empty figure of so many pixels, and the settings that figures are drawn with."""
    with mpl.rc_context(
        {
            "font.size": FONT_SIZE,
            "text.parse_math": False,  # a $ in a setting's name is a $
            "text.color": COLOURS["ink"],
            "axes.edgecolor": COLOURS["rule"],
            "axes.labelcolor": COLOURS["muted"],
            "xtick.color": COLOURS["muted"],
            "ytick.color": COLOURS["muted"],
            "axes.spines.left": False,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
        }
    ):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasAgg(figure)  # measures texts
        yield figure


def plot_area(figure: Figure, left: float, bottom: float, right: float, top: float) -> Axes:
    """Add axes whose sides are so many pixels from the figure's; horizontal grid lines only."""
    width, height = figure.bbox.width, figure.bbox.height
    axes = figure.add_axes(
        (
            left / width,
            bottom / height,
            (width - left - right) / width,
            (height - bottom - top) / height,
        ),
        facecolor="none",
    )
    axes.grid(axis="y", color=COLOURS["rule"], linewidth=1)
    axes.set_axisbelow(True)
    return axes


def inline_svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """Return a figure as an <svg> element.

    Args:
        figure: drawn in COLOURS.
        name: unique in the page; ids inside begin with it.
        title: what is shown, for those who do not see it.
        description: what can be seen in it.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    root = ET.fromstring(buffer.getvalue())
    _drop_what_the_page_has(root)
    _rename_ids(root, name)
    for element in root.iter():
        if "style" in element.attrib:
            element.attrib["style"] = _page_style(element.attrib["style"])
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "style": f"max-width: {figure.bbox.width:.0f}px",
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
    }
    for tag, text in (("desc", description), ("title", title)):
        element = ET.Element(tag, {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(0, element)
    return Markup(ET.tostring(root, encoding="unicode"))


def _drop_what_the_page_has(root: ET.Element) -> None:
    """Remove metadata, a style sheet for everything, name spaces and white space."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {k.rpartition("}")[2]: v for k, v in element.attrib.items()}
        element.tail = None
        if element.text and not element.text.strip():
            element.text = None


def _rename_ids(root: ET.Element, name: str) -> None:
    """Keep the ids that are referred to, with the figure's name before them."""
    references = re.compile(r"(?<=#)[\w.-]+")
    used = {
        found
        for element in root.iter()
        for key in ("href", "clip-path")
        for found in references.findall(element.get(key, ""))
    }
    for element in root.iter():
        if element.get("id") in used:
            element.attrib["id"] = f"{name}-{element.attrib['id']}"
        else:
            element.attrib.pop("id", None)
        for key in ("href", "clip-path"):
            if key in element.attrib:
                element.attrib[key] = references.sub(rf"{name}-\g<0>", element.attrib[key])


def _page_style(style: str) -> str:
    """Return a style in the page's colours and font."""
    style = re.sub(r"font-family: [^;]*;? ?", "", style)
    return re.sub(r"#[0-9a-f]{6}", lambda m: f"var(--{_NAMES.get(m[0], 'ink')})", style)
