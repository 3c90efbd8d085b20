"""Text of any script in plots: fonts that have its glyphs, and a romanised form if none is installed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

DEFAULT_FONT = "DejaVu Sans"  # part of matplotlib: Latin, Greek, Cyrillic, Hebrew, Arabic and more


@dataclass(frozen=True, slots=True)
class PlotText:
    """How given texts can be drawn on this machine."""

    families: tuple[str, ...]  # fonts, in matplotlib's order of preference
    without_glyphs: frozenset[str]  # characters that no installed font has

    @classmethod
    def of(cls, texts: Iterable[str]) -> PlotText:
        """Searches for fonts only if matplotlib's own lacks a character."""
        missing = {char for char in "".join(texts) if not char.isspace()} - _glyphs_of_default()
        families = [DEFAULT_FONT]
        fonts = _installed_fonts() if missing else {}
        while missing and fonts:
            best = max(fonts, key=lambda family: (len(fonts[family] & missing), "Mono" not in family, "Sans" in family))
            if not fonts[best] & missing:
                break
            families.append(best)
            missing -= fonts[best]
        return cls(tuple(families), frozenset(missing))

    def __call__(self, text: str) -> str:
        """The text, in Latin letters where it would be drawn as boxes."""
        from anyascii import anyascii

        return anyascii(text).strip() or ascii(text)[1:-1] if self.without_glyphs.intersection(text) else text

    @contextmanager
    def fonts(self) -> Iterator[None]:
        """Inside, matplotlib makes and draws texts with these fonts."""
        from matplotlib import rc_context

        with rc_context({"font.family": list(self.families)}):
            yield


@cache
def _glyphs_of_default() -> frozenset[str]:
    from matplotlib import font_manager

    return _glyphs(font_manager.findfont(DEFAULT_FONT))


@cache
def _installed_fonts() -> dict[str, frozenset[str]]:
    """Characters of each plain font family on this machine. Takes milliseconds per font."""
    from matplotlib import font_manager

    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():  # installed after matplotlib made its list
        if path not in known:
            try:
                font_manager.fontManager.addfont(path)
            except (OSError, RuntimeError, ValueError):  # a font that matplotlib cannot read
                continue
    found: dict[str, frozenset[str]] = {}
    for entry in font_manager.fontManager.ttflist:
        plain = entry.style == "normal" and entry.weight in (400, 500, "normal", "regular", "book", "medium")
        if plain and entry.name not in found and not entry.name.startswith(("DejaVu", "STIX", "cm", "Last Resort")):
            found[entry.name] = _glyphs(entry.fname)
    return found


def _glyphs(path: str | os.PathLike[str]) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError):  # bitmaps only, or deleted since matplotlib made its list
        return frozenset()
