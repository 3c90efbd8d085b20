"""The situations of the toy word problems: the numbers that each one draws and the computation of its answer.

`STRUCTURES` has 40 seen and 12 held-out situations over seven operations. The phrasings of each language refer to
`Structure.id`.

Every number that counts a noun in the text is in 5..20, where one plural form is correct in all ten languages (the
Russian genitive plural included). Dividends reach 81 and occur only before units that do not inflect (kg, km, m,
euros).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True, slots=True)
class Operation:
    """A calculation: the numbers to draw, those computed from them in order, and the written working."""

    ranges: Mapping[str, tuple[int, int]]
    """Inclusive range of each drawn number."""
    derived: Mapping[str, Callable[[Mapping[str, int]], int]]
    """Computed numbers; each may use the drawn ones and those computed before it. `result` is the answer."""
    working: str
    placeholders: tuple[str, ...]
    """Numbers that the question contains; each phrasing has exactly these placeholders."""


ADD = Operation(
    ranges={"a": (5, 14), "b": (5, 14)},
    derived={"result": lambda v: v["a"] + v["b"]},
    working="{a} + {b} = {result}",
    placeholders=("a", "b"),
)
SUBTRACT = Operation(
    ranges={"a": (11, 20), "b": (5, 9)},
    derived={"result": lambda v: v["a"] - v["b"]},
    working="{a} - {b} = {result}",
    placeholders=("a", "b"),
)
MULTIPLY = Operation(
    ranges={"a": (5, 9), "b": (5, 9)},
    derived={"result": lambda v: v["a"] * v["b"]},
    working="{a} * {b} = {result}",
    placeholders=("a", "b"),
)
DIVIDE = Operation(
    ranges={"b": (5, 9), "result": (5, 9)},
    derived={"t": lambda v: v["b"] * v["result"]},
    working="{t} / {b} = {result}",
    placeholders=("t", "b"),
)
ADD_SUBTRACT = Operation(
    ranges={"a": (5, 10), "b": (5, 10), "c": (5, 8)},
    derived={"m": lambda v: v["a"] + v["b"], "result": lambda v: v["m"] - v["c"]},
    working="{a} + {b} = {m}, {m} - {c} = {result}",
    placeholders=("a", "b", "c"),
)
MULTIPLY_ADD = Operation(
    ranges={"a": (5, 9), "b": (5, 9), "c": (5, 9)},
    derived={"m": lambda v: v["a"] * v["b"], "result": lambda v: v["m"] + v["c"]},
    working="{a} * {b} = {m}, {m} + {c} = {result}",
    placeholders=("a", "b", "c"),
)
MULTIPLY_SUBTRACT = Operation(
    ranges={"a": (5, 9), "b": (5, 9), "c": (5, 9)},
    derived={"m": lambda v: v["a"] * v["b"], "result": lambda v: v["m"] - v["c"]},
    working="{a} * {b} = {m}, {m} - {c} = {result}",
    placeholders=("a", "b", "c"),
)


@dataclass(frozen=True, slots=True)
class Structure:
    """One situation. `named`: its phrasings have {name} for a person; `held_out`: never in training."""

    id: str
    operation: Operation
    named: bool = True
    held_out: bool = False

    @property
    def placeholders(self) -> frozenset[str]:
        """The placeholders of each phrasing, in every language."""
        return frozenset(self.operation.placeholders) | ({"name"} if self.named else frozenset())

    def draws(self) -> Iterator[dict[str, int]]:
        """All the number sets of this situation, drawn and computed, in a fixed order."""
        ranges = self.operation.ranges
        for numbers in product(*(range(low, high + 1) for low, high in ranges.values())):
            values = dict(zip(ranges, numbers, strict=True))
            for name, compute in self.operation.derived.items():
                values[name] = compute(values)
            yield values


STRUCTURES: tuple[Structure, ...] = (
    Structure("fruit_bought", ADD),
    Structure("class_size", ADD, named=False),
    Structure("pages_day", ADD),
    Structure("tulips_planted", ADD),
    Structure("bus_boarding", ADD, named=False),
    Structure("savings_months", ADD),
    Structure("weekend_walk", ADD),
    Structure("farm_animals", ADD),
    Structure("fish_caught", ADD),
    Structure("problems_solved", ADD),
    Structure("dishes_washed", ADD, held_out=True),
    Structure("tickets_sold", ADD, held_out=True),
    Structure("shells_found", ADD, held_out=True),
    Structure("apples_eaten", SUBTRACT),
    Structure("bus_leaving", SUBTRACT, named=False),
    Structure("balloons_burst", SUBTRACT),
    Structure("chapters_left", SUBTRACT),
    Structure("eggs_broken", SUBTRACT),
    Structure("money_spent", SUBTRACT),
    Structure("birds_flown", SUBTRACT, named=False),
    Structure("candles_out", SUBTRACT),
    Structure("cars_parked", SUBTRACT, named=False, held_out=True),
    Structure("stamps_given", SUBTRACT, held_out=True),
    Structure("water_used", SUBTRACT, held_out=True),
    Structure("pencil_boxes", MULTIPLY),
    Structure("chair_rows", MULTIPLY, named=False),
    Structure("pages_week", MULTIPLY),
    Structure("ticket_cost", MULTIPLY),
    Structure("wages_earned", MULTIPLY),
    Structure("daily_run", MULTIPLY),
    Structure("orange_bags", MULTIPLY),
    Structure("book_shelves", MULTIPLY),
    Structure("rose_bouquets", MULTIPLY),
    Structure("cookie_trays", MULTIPLY, held_out=True),
    Structure("wedding_tables", MULTIPLY, named=False, held_out=True),
    Structure("rice_sacks", DIVIDE),
    Structure("rope_pieces", DIVIDE),
    Structure("hike_days", DIVIDE),
    Structure("hourly_pay", DIVIDE),
    Structure("cyclist_speed", DIVIDE, named=False),
    Structure("ribbon_gifts", DIVIDE),
    Structure("tent_savings", DIVIDE),
    Structure("prize_shared", DIVIDE, named=False, held_out=True),
    Structure("crate_weight", DIVIDE, held_out=True),
    Structure("apples_picked_given", ADD_SUBTRACT),
    Structure("bus_two_stops", ADD_SUBTRACT, named=False),
    Structure("weekend_money", ADD_SUBTRACT, held_out=True),
    Structure("pencils_and_loose", MULTIPLY_ADD),
    Structure("wages_and_tip", MULTIPLY_ADD),
    Structure("oranges_packed_sold", MULTIPLY_SUBTRACT),
    Structure("theatre_seats", MULTIPLY_SUBTRACT, named=False),
    Structure("egg_cartons", MULTIPLY_SUBTRACT, held_out=True),
)
