"""Text in plots is drawn with fonts that have its glyphs, or in Latin letters."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from data_pipeline import plot_text
from data_pipeline.plot_text import PlotText

SCRIPTS = {"zh": "中文", "ja": "日本語", "th": "ไทย", "bn": "বাংলা", "te": "తెలుగు", "ko": "한국어"}


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with only matplotlib's bundled fonts."""
    monkeypatch.setattr(plot_text, "_installed_fonts", dict)


@pytest.mark.usefixtures("no_fonts")
@pytest.mark.parametrize("name", SCRIPTS.values())
def test_a_script_without_a_font_is_romanised(name: str) -> None:
    text = PlotText.of([name, "en"])
    assert text(name).isascii()
    assert any(char.isalpha() for char in text(name))
    assert text("en") == "en"


@pytest.mark.usefixtures("no_fonts")
@pytest.mark.parametrize("name", ["русский", "Ελληνικά", "العربية", "Türkçe", "עברית"])
def test_text_in_matplotlibs_own_font_is_unchanged(name: str) -> None:
    assert PlotText.of([name]).families == (plot_text.DEFAULT_FONT,)
    assert PlotText.of([name])(name) == name


def test_fonts_are_chosen_by_their_glyphs(monkeypatch: pytest.MonkeyPatch) -> None:
    fonts = {"Serif Thai": frozenset("ไทย"), "Sans Thai": frozenset("ไทย"), "Sans Mono CJK": frozenset("中文日本語"),
             "Sans CJK": frozenset("中文日本語"), "Half Thai": frozenset("ไ")}  # fmt: skip
    monkeypatch.setattr(plot_text, "_installed_fonts", lambda: fonts)
    text = PlotText.of(["中文", "ไทย", "বাংলা"])
    assert text.families[0] == plot_text.DEFAULT_FONT
    assert set(text.families[1:]) == {"Sans CJK", "Sans Thai"}
    assert (text("中文"), text("ไทย")) == ("中文", "ไทย")
    assert text("বাংলা").isascii()


def test_fonts_are_not_searched_if_all_glyphs_are_available(monkeypatch: pytest.MonkeyPatch) -> None:
    def search() -> None:
        raise AssertionError

    monkeypatch.setattr(plot_text, "_installed_fonts", search)
    assert PlotText.of(["en", "sw", "العربية", "two words"]).without_glyphs == frozenset()


def test_the_last_resort_font_is_not_used() -> None:
    """It is bundled with matplotlib and draws a box for every character."""
    assert not [name for name in plot_text._installed_fonts() if "Last Resort" in name]


def test_plots_of_a_run_draw_no_missing_glyphs(tmp_path: Path) -> None:
    """On any machine: matplotlib warns about each glyph that no font has."""
    from training.tracking.plots import draw_plots
    from training.tracking.run_record import RunRecord

    record = RunRecord(tmp_path)
    names = [*SCRIPTS.values(), "العربية", "en"]
    record.append("metrics", step=1, values={f"train/loss/{name}": 1.0 for name in names})
    record.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (plot,) = draw_plots(tmp_path)
    assert plot.name == "train_loss.png"
