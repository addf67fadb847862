"""emu_embodied: token world models that a robot can plan with.

Public names are loaded on first use, so that ``import emu_embodied`` stays quick and pulls in no simulator.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").exists():
    # In a checkout the outer rooms (envs/, policies/ ...) stand beside this folder; a wheel has them inside.
    __path__.append(str(_CHECKOUT))

_PUBLIC = {
    "WorldModel": "emu_embodied.world_model",
    "EmuForCausalLM": "emu_embodied.models.transformer",
    "EmuConfig": "emu_embodied.models.transformer",
    "IBQ": "emu_embodied.models.ibq",
    "TextTokenizer": "emu_embodied.tokens.text",
    "InterleavedModel": "emu_embodied.interleaved",
    "GenerationRequest": "emu_embodied.interleaved",
    "GenerationSettings": "emu_embodied.interleaved",
    "Observation": "emu_embodied.records",
    "Episode": "emu_embodied.records",
    "Imagination": "emu_embodied.records",
    "Plan": "emu_embodied.records",
}
__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from emu_embodied.interleaved import GenerationRequest as GenerationRequest
    from emu_embodied.interleaved import GenerationSettings as GenerationSettings
    from emu_embodied.interleaved import InterleavedModel as InterleavedModel
    from emu_embodied.models.ibq import IBQ as IBQ
    from emu_embodied.models.transformer import EmuConfig as EmuConfig
    from emu_embodied.models.transformer import EmuForCausalLM as EmuForCausalLM
    from emu_embodied.records import Episode as Episode
    from emu_embodied.records import Imagination as Imagination
    from emu_embodied.records import Observation as Observation
    from emu_embodied.records import Plan as Plan
    from emu_embodied.tokens.text import TextTokenizer as TextTokenizer
    from emu_embodied.world_model import WorldModel as WorldModel


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
