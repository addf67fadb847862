"""Worlds: manipulation tasks behind Gymnasium's API and the ``Simulator`` protocol.

Importing this package registers the environments, so ``gymnasium.make("emu_embodied.envs:PandaPush-v0")`` works; no
physics engine is imported before an environment is made.
"""

if __name__ == "envs":
    raise ImportError("import emu_embodied.envs: the folder is one package with emu_embodied")

from emu_embodied.envs.registry import env_ids, make, register_all, suite_ids

__all__ = ["env_ids", "make", "suite_ids"]

register_all()
