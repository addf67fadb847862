"""The field's own benchmarks, one file each: its docstring says where the rule comes from and how ours differs.

``goals.py`` poses goal-reaching problems, ``protocol.py`` says what a protocol is and what stands in its table, and
``runner.py`` measures. ``emu-embodied bench --protocol p1 --json FILE`` runs one from nothing to the table.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emu_embodied.experiments.protocols.protocol import Protocol

PROTOCOLS: dict[str, str] = {
    "p1": "Push-T: a goal picture 25 env steps ahead",
    "p2": "OGBench's cube and Fetch's reach and push: a goal picture 25 env steps ahead",
    "p3": "Meta-World: six tasks, with a model trained on 100,000 env steps",
    "p5": "Meta-World's reach and reach-wall: the picture of the task solved",
}
"""Name -> what it is."""


def find_protocol(name: str) -> Protocol:
    """A protocol by name.

    Raises:
        ValueError: if there is none of this name; the message names the nearest one.
    """
    if name not in PROTOCOLS:
        near = get_close_matches(name.lower(), PROTOCOLS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = "; ".join(f"{known} ({what})" for known, what in PROTOCOLS.items())
        raise ValueError(f"unknown protocol {name!r}: {hint}known are {known}")
    module = import_module(f"emu_embodied.experiments.protocols.{name}")
    protocol: Protocol = module.PROTOCOL
    return protocol
