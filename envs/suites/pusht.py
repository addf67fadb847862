"""Push-T (Chi et al. 2023; gym-pusht): a disc pushes a T-shaped block onto its outline, seen from above."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

from gym_pusht.envs.pusht import PushTEnv

from emu_embodied.envs.suites.pusher import AGENT_RADIUS, Block, Pusher
from emu_embodied.records import Field

REACH = 100.0
"""[px] an action of 1 asks the disc to go this far from where it is: DINO-WM's rule."""
_LOW, _HIGH = AGENT_RADIUS + 5.0, 512.0 - AGENT_RADIUS - 5.0
"""[px] where the disc may be sent: the inside of the walls."""


class _Unscored(PushTEnv):
    """The suite's environment without the reward of every step, which takes a quarter of its time: ask ``covered``."""

    def _get_coverage(self) -> float:
        return 0.0

    def covered(self) -> float:
        """Share of the outline under the block."""
        return float(super()._get_coverage())


@dataclass(frozen=True, slots=True)
class _State:
    """Where everything is: agent x, y, vx, vy; block x, y, angle, vx, vy, angular velocity [px, s, rad]."""

    agent: tuple[float, float, float, float]
    block: tuple[float, float, float, float, float, float]


class PushT:
    """``World`` of Push-T.

    Actions: where the disc is sent, relative to where it is (x to the right, y downwards; 1 is 100 px). Reward: the
    suite's, covered share of the outline over 0.95; success: more than 0.95 of it covered.

    pymunk keeps contact impulses from step to step and gives nobody access to them. Here they are forgotten between env
    steps (ten physics steps each): what happens next is then a function of positions and velocities, so that snapshots
    are exact. The block damps so strongly that it hardly shows: paths agree with gym-pusht's to a fraction of a pixel.

    Args:
        task: ``PushT``.
        image_size: edge of the pictures [px].
    """

    proprio_fields = (
        Field("agent_x", "px", 0.0, 512.0),
        Field("agent_y", "px", 0.0, 512.0),
        Field("agent_vx", "px/s", -500.0, 500.0),
        Field("agent_vy", "px/s", -500.0, 500.0),
    )
    object_fields = (
        Field("block_x", "px", 0.0, 512.0),
        Field("block_y", "px", 0.0, 512.0),
        Field("block_sin", "1", -1.0, 1.0),
        Field("block_cos", "1", -1.0, 1.0),
    )
    action_dim = 2
    cameras = ("top",)
    weights = {"coverage": 1.0}  # noqa: RUF012 (never changed)
    max_episode_steps = 300
    control_dt = 0.1
    instruction = "push the t onto its outline"

    def __init__(self, task: str, *, image_size: int = 64) -> None:
        self._env: Any = _Unscored(obs_type="state", observation_width=image_size, observation_height=image_size)
        self._state = _State((0.0,) * 4, (0.0,) * 6)

    def begin(self, seed: int | None, rng: np.random.Generator) -> None:
        """See ``World``."""
        self._env.reset(seed=int(rng.integers(2**31)))
        self._remember()

    def advance(self, action: np.ndarray) -> None:
        """See ``World``."""
        self._env.step(np.clip(np.array(self._env.agent.position) + REACH * action, _LOW, _HIGH))
        self._remember()

    def terms(self) -> dict[str, float]:
        """See ``World``."""
        coverage = self._env.covered()
        return {"coverage": min(max(coverage / 0.95, 0.0), 1.0), "success": float(coverage > 0.95)}

    def proprio(self) -> np.ndarray:
        """See ``World``."""
        return np.array(self._state.agent)

    def objects(self) -> np.ndarray:
        """See ``World``: the block's position and angle."""
        x, y, angle = self._state.block[:3]
        return np.array([x, y, np.sin(angle), np.cos(angle)])

    def draw(self, camera: str) -> np.ndarray:
        """See ``World``."""
        return self._env._render()

    def save(self) -> _State:
        """See ``World``."""
        return self._state

    def load(self, saved: _State) -> None:
        """See ``World``."""
        env = self._env
        env._setup()  # a new space, without contacts
        for body, numbers in ((env.agent, (*saved.agent[:2], 0.0, *saved.agent[2:], 0.0)), (env.block, saved.block)):
            # The angle first: turning goes about the centre of mass and would move the position.
            body.angle = numbers[2]
            body.position = numbers[:2]
            body.velocity = numbers[3:5]
            body.angular_velocity = numbers[5]
            env.space.reindex_shapes_for_body(body)
        self._state = saved

    def solve(self) -> bool:
        """See ``World``: the block on its outline, the disc where it is, or beside the block if it would be in it."""
        goal = self.goal_block()
        agent = np.array(self._state.agent[:2])
        away = agent - goal.middle
        far = max(float(np.linalg.norm(away)), 1e-6)
        agent = goal.middle + away / far * max(far, 130.0)
        self.place(np.clip(agent, _LOW, _HIGH), self._env.goal_pose)
        return True

    def oracle(self, rng: np.random.Generator) -> Pusher:
        """A pusher that looks two pushes ahead."""
        return Pusher(self, rng)

    def player(self, rng: np.random.Generator) -> Pusher:
        """Pushes anywhere, from any side."""
        return Pusher(self, rng, playful=True)

    def close(self) -> None:
        """See ``World``."""
        self._env.close()

    # What pushers and protocols ask for

    @property
    def agent(self) -> np.ndarray:
        """float64 [2], the disc's middle [px]."""
        return np.array(self._state.agent[:2])

    def block(self) -> Block:
        """The block's pose and shape."""
        return _block(self._env.block, self._env.block.position, self._env.block.angle)

    def goal_block(self) -> Block:
        """The same with the block on its outline."""
        return _block(self._env.block, self._env.goal_pose[:2], float(self._env.goal_pose[2]))

    def place(self, agent: np.ndarray, block_pose: np.ndarray) -> None:
        """Put disc [px] and block (x, y [px], angle [rad]) somewhere, at rest."""
        x, y, angle = (float(value) for value in block_pose)
        self.load(_State((float(agent[0]), float(agent[1]), 0.0, 0.0), (x, y, angle, 0.0, 0.0, 0.0)))

    def _remember(self) -> None:
        agent, block = self._env.agent, self._env.block
        self.load(
            _State(
                (*agent.position, *agent.velocity),
                (*block.position, block.angle, *block.velocity, block.angular_velocity),
            )
        )


def _block(body: Any, position: Any, angle: float) -> Block:
    parts = tuple(np.array(shape.get_vertices(), float) for shape in sorted(body.shapes, key=lambda s: s.area))
    return Block(
        parts=parts,
        centre=np.array(body.center_of_gravity, float),
        inertia=float(body.moment / body.mass),
        position=np.array(position, float),
        angle=float(angle),
    )
