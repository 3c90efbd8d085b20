"""The text table is aligned, with every cell in its column and absent scores as dashes."""

from __future__ import annotations

import pytest

from evals.report import Accuracy, accuracy_table


def test_the_table_is_aligned() -> None:
    table = accuracy_table(
        [
            ("en", [Accuracy(0.5, 0.43849, 0.5615), Accuracy(1.0, 0.985, 1.0)]),
            ("bn*", [Accuracy(0.024, 0.0111, 0.051), None]),
            ("average", [Accuracy(0.262), None]),
        ],
        ["msft", "shifcon"],
        notes=["* no language vector: ran unshifted"],
    )
    assert table == (
        "language  msft                 shifcon\n"
        "--------  -------------------  ---------------------\n"
        "en        50.0 % [43.8, 56.1]  100.0 % [98.5, 100.0]\n"
        "bn*       2.4 % [1.1, 5.1]     -\n"
        "average   26.2 %               -\n"
        "* no language vector: ran unshifted"
    )


def test_a_row_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="row 'en' has 1 cells for 2 columns"):
        accuracy_table([("en", [None])], ["a", "b"])
