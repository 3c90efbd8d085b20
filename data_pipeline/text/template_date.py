"""The date in a chat template: transformers gives templates `strftime_now`, which is another day's on each day."""

from __future__ import annotations

import datetime as dt
import json
import re

DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"  # of strftime


def date_macro(template: str, day: dt.date) -> str:
    """A macro in place of `strftime_now`, which gives today's date, for the directives that the template may use."""
    today = dt.datetime.combine(day, dt.time())
    used = {found for found in re.findall(r"%[-_0^#]?[A-Za-z]", template) if found[-1] in DIRECTIVES}
    longest_first = sorted(used, key=lambda each: (-len(each), each))
    replaced = "".join(f" | replace({json.dumps(each)}, {json.dumps(today.strftime(each))})" for each in longest_first)
    return f"{{%- macro strftime_now(format) -%}}{{{{- format{replaced} -}}}}{{%- endmacro -%}}"
