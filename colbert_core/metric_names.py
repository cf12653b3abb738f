"""The metrics there are, by name; light to import, for recipes name them."""

from __future__ import annotations

import re

from colbert_core.errors import ConfigError

# Each is checked in the tests against values worked out by hand.
FAMILIES = ("nDCG", "R", "P", "AP", "RR", "Success")
ALIASES = {"MAP": "AP", "MRR": "RR"}
_MEASURE = re.compile(r"([A-Za-z]+)@([1-9][0-9]*)")


def parse_metric(name: str) -> tuple[str, int]:
    """The family of a metric such as ``MRR@10``, here ``RR``, and the rank that it looks down to.

    Raises:
        ConfigError: an unknown metric; the message lists those there are.
    """
    match = _MEASURE.fullmatch(name.strip())
    family = ALIASES.get(match[1], match[1]) if match else ""
    if match is None or family not in FAMILIES:
        known = ", ".join(f"{family}@k" for family in (*FAMILIES, *ALIASES))
        raise ConfigError(f"unknown metric {name!r}; there are {known}")
    return family, int(match[2])
