"""How fast the worlds are on one core: physics, pictures, and the tuned renderer against the default one.

python -m emu_embodied.experiments.bench_envs --json results/bench_envs.json
python -m emu_embodied.experiments.bench_envs --suite fetch
python -m emu_embodied.experiments.bench_envs --env PushT,MetaWorld/hammer-v3 --steps 40 --repeats 3
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import tyro

from emu_embodied.envs import env_ids, make, suite_ids
from emu_embodied.envs.panda import PandaEnv
from emu_embodied.envs.suites.world import SuiteEnv
from emu_embodied.files import write_json
from emu_embodied.provenance import make_meta, meta_dict


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """What to measure."""

    env: str = ""
    """Environment ids with commas between; all of our own where empty."""
    suite: str = ""
    """A suite's environments instead."""
    steps: int = 300
    """Env steps in one measurement [env steps]."""
    default_frames: int = 10
    """Pictures in one measurement of MuJoCo's default flags, which take long [pictures]."""
    repeats: int = 5
    """Measurements of each kind; the median is reported."""
    json: Path | None = None
    """Where to write the rows, after every one; rows of other environments that are there already stay, as suites that
    need packages of their own are measured one after another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One environment. All times are CPU times of one core, which a busy machine disturbs less than wall times."""

    env: str
    steps_per_second: float
    """Env steps per second without pictures [1/s]."""
    steps_per_second_block: float
    """Env steps per second with one 64-px picture after every action block of five [1/s]: what planning needs."""
    steps_per_second_64px: float
    """Env steps per second with one 64-px picture after each [1/s]."""
    frame_ms: float
    """One 64-px picture [ms]."""
    default_frame_ms: float | None
    """The same picture as it comes: our worlds with MuJoCo's default flags (shadows, reflections, four samples), a
    suite's own model with all its faces and default flags [ms]; None in our Bullet worlds and where ours is theirs."""
    default_ratio: float | None
    """``default_frame_ms / frame_ms``; None where that is."""


def bench(env_id: str, config: BenchConfig) -> Row:
    """Measure one environment."""
    env = make(env_id)
    camera = env.cameras[0]
    env.cameras = (camera,)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    action_dim = env.action_dim if isinstance(env, SuiteEnv) else 4

    def step(*, render: bool, block: int = 1) -> None:
        env.step_block(rng.uniform(-1, 1, (block, action_dim)), render=render)

    frame_ms = _milliseconds(lambda: env.render(camera), config.steps, config.repeats)
    default_ms = None
    if isinstance(env, SuiteEnv):
        default_ms = _suites_frame_ms(env, camera, config)
    elif "Bullet" not in env_id:
        default_ms = _default_frame_ms(env, config)
    blocks = max(1, config.steps // env.block)
    row = Row(
        env=env_id,
        steps_per_second=1e3 / _milliseconds(lambda: step(render=False), config.steps, config.repeats),
        steps_per_second_block=1e3
        * env.block
        / _milliseconds(lambda: step(render=True, block=env.block), blocks, config.repeats),
        steps_per_second_64px=1e3 / _milliseconds(lambda: step(render=True), config.steps, config.repeats),
        frame_ms=frame_ms,
        default_frame_ms=default_ms,
        default_ratio=None if default_ms is None else default_ms / frame_ms,
    )
    env.close()
    return row


def _default_frame_ms(env: PandaEnv, config: BenchConfig) -> float:
    """The same world in the same state, drawn by a renderer that was left as MuJoCo makes it."""
    import mujoco

    from emu_embodied.envs.mujoco.model import build_model

    model = build_model(env.task, image_size=64, pretty=False)
    defaults = mujoco.MjModel.from_xml_string("<mujoco/>").vis.quality
    model.vis.quality.offsamples, model.vis.quality.shadowsize = defaults.offsamples, defaults.shadowsize
    model.light_castshadow[:] = 1
    data = mujoco.MjData(model)
    mujoco.mj_setState(model, data, env.snapshot().engine, int(mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_forward(model, data)
    with mujoco.Renderer(model, 64, 64) as renderer:

        def picture() -> np.ndarray:
            renderer.update_scene(data, "front")
            return renderer.render()

        return _milliseconds(picture, config.default_frames, config.repeats)


def _suites_frame_ms(env: SuiteEnv, camera: str, config: BenchConfig) -> float | None:
    """The same state of a suite as it would be drawn without us; None where nothing is changed."""
    world: Any = env.world
    if env.env_id.startswith("PandaGym/"):
        inner = gymnasium.make(
            f"Panda{env.env_id.partition('/')[2]}-v3", render_mode="rgb_array", render_width=64, render_height=64
        )
        inner.reset(seed=0)
        taken = _milliseconds(inner.render, config.default_frames, config.repeats)
        inner.close()
        return taken
    if not hasattr(world, "_view"):
        return None
    import mujoco

    view = world._view
    tuned = view._renderer
    with mujoco.Renderer(view._model, 64, 64) as view._renderer:
        taken = _milliseconds(lambda: env.render(camera), config.default_frames, config.repeats)
    view._renderer = tuned
    return taken


def _milliseconds(run: Callable[[], object], times: int, repeats: int) -> float:
    """CPU time of one ``run`` [ms]: the median over ``repeats`` of the mean over ``times``."""
    run()  # renderers are made and caches filled on the first use
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(times):
            run()
        taken.append((time.process_time() - start) / times)
    return 1e3 * float(np.median(taken))


def main(config: BenchConfig) -> None:
    """Measure, print a table, write JSON."""
    # One thread for a software OpenGL, whose figures are then per core too. Read when the first engine is imported.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    ids = [name.strip() for name in config.env.split(",") if name.strip()] or (
        suite_ids(config.suite) if config.suite else env_ids()
    )
    print(
        f"{'env':36s} {'steps/s':>8s} {'a block':>8s} {'each':>8s} {'frame ms':>9s} {'default ms':>10s} {'ratio':>6s}"
    )
    rows = _rows(config.json, but=ids)
    for env_id in ids:
        row = bench(env_id, config)
        rows.append(asdict(row))
        default = (
            f"{row.default_frame_ms:10.2f} {row.default_ratio:6.1f}" if row.default_ratio else f"{'-':>10s} {'-':>6s}"
        )
        print(
            f"{env_id:36s} {row.steps_per_second:8.0f} {row.steps_per_second_block:8.0f} "
            f"{row.steps_per_second_64px:8.0f} {row.frame_ms:9.2f} {default}"
        )
        if config.json is not None:
            write_json(config.json, {"rows": rows, "meta": meta_dict(make_meta())})


def _rows(path: Path | None, *, but: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of an earlier run, without those that are measured anew.

    Raises:
        ValueError: if the file holds something else.
    """
    if path is None or not path.exists():
        return []
    try:
        return [row for row in json.loads(path.read_text())["rows"] if row["env"] not in but]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no rows of bench_envs ({error!r}): give another --json") from error


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
