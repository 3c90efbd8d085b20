"""A fixed date for chat templates, whose `strftime_now` in transformers gives the current date."""

from __future__ import annotations

import datetime as dt
import json
import re

DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"  # of strftime


def date_macro(template: str, day: dt.date) -> str:
    """A Jinja macro that replaces `strftime_now` and formats `day`, for the directives that the template uses."""
    today = dt.datetime.combine(day, dt.time())
    used = {found for found in re.findall(r"%[-_0^#]?[A-Za-z]", template) if found[-1] in DIRECTIVES}
    longest_first = sorted(used, key=lambda each: (-len(each), each))
    replaced = "".join(f" | replace({json.dumps(each)}, {json.dumps(today.strftime(each))})" for each in longest_first)
    return f"{{%- macro strftime_now(format) -%}}{{{{- format{replaced} -}}}}{{%- endmacro -%}}"
