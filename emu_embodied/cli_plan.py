"""``plan`` and ``bench``: one episode looked at, and many counted. Part of the composition root, as ``cli.py`` is."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emu_embodied.cli_train import Device

if TYPE_CHECKING:
    from emu_embodied.policies.registry import PolicySpec
    from emu_embodied.protocols import SubgoalModel
    from emu_embodied.world_model import WorldModel


def named_envs(env: str, suite: str) -> list[str]:
    """The ids that ``--env`` names or ``--suite`` stands for, each of them known and installed."""
    from emu_embodied.envs.registry import check_env_id, suite_ids

    if bool(env) == bool(suite):
        raise ValueError("give --env or --suite, one of them")
    env_ids = [name.strip() for name in env.split(",")] if env else list(suite_ids(suite))
    for env_id in env_ids:
        check_env_id(env_id)
    return env_ids


@dataclass(frozen=True, kw_only=True)
class Search:
    """Flags of everything that plans."""

    checkpoint: str = "nano"
    """A shipped name or a checkpoint folder."""
    planner: Literal["cem", "icem", "categorical", "mppi", "beam", "shooting"] = "cem"
    """Solver of the imagined and true policies."""
    objective: str = "goal"
    """What plans are searched for: goal (the goal picture and place), objects (where the model sees things in the goal
    picture, and place), or what the model predicts of the instruction: reward, success, or both of these."""
    samples: int | None = None
    """Candidate plans in an iteration."""
    iterations: int | None = None
    """Iterations of a decision."""
    horizon: int | None = None
    """Length of a plan [blocks]."""
    replan_every: int | None = None
    """Blocks of a plan that are executed before the next search [blocks]."""
    init_std: float | None = None
    """Standard deviation of the first candidates, about that of the actions that the task takes [action units]."""
    answer: Literal["best", "mean"] | None = None
    """What a planner that refines returns: its cheapest candidate or its last mean."""
    beta: float | None = None
    """Exponent of coloured noise in the candidates: 0 is white, 2 drifts; by default the planner's own noise."""
    decodes: int | None = None
    """Imaginations of each candidate, whose costs are averaged."""
    proposals: float | None = None
    """Share of the first candidates that the checkpoint's token policy proposes, in [0, 1]."""
    proposal_temperature: float | None = None
    """Of the draws of what it proposes; at 0 all of a state's proposals are the same."""
    strangeness: float | None = None
    """Weight, beside the objective, of how unlikely the token policy finds what a plan does first."""
    device: Device = "auto"
    """Where the world model runs."""

    def _budget(self) -> dict[str, Any]:
        """What was asked for of a ``PlanningBudget``."""
        from emu_embodied.policies.registry import PlanningBudget

        names = {field.name for field in fields(PlanningBudget)} & {field.name for field in fields(Search)}
        asked = {name: getattr(self, name) for name in sorted(names)}
        return {name: value for name, value in asked.items() if value is not None}

    def _spec(self, policy: str) -> PolicySpec:
        from emu_embodied.hardware import pick_device
        from emu_embodied.policies.registry import PlanningBudget, PolicySpec

        return PolicySpec(
            name=policy,
            checkpoint=self.checkpoint or "nano",
            planner=self.planner,
            objective=self.objective,
            budget=PlanningBudget(**self._budget()),
            device=str(pick_device(self.device)),
        )


@dataclass(frozen=True, kw_only=True)
class Plan(Search):
    """Plan and execute one episode; write a video (real | imagined), a figure and the result.

    Writes ``plan.mp4``, ``imagined_vs_real.png`` and ``result.json`` into --out.
    """

    env: str
    """Environment id."""
    policy: Literal["imagined", "shooting", "true"] = "imagined"
    """Where plans are tried out: in imagination, or (``true``) in the simulator itself."""
    subgoals: bool = False
    """Let the model say what to do next, in words and pictures, and plan to each picture in turn (instead of
    --objective); adds ``subgoals.png`` and ``subgoals.md``."""
    subgoal_model: Path | None = None
    """Folder of Emu3.5's own weights, to be asked instead of --checkpoint what to do next."""
    seed: int = 0
    """Reset seed of the environment, and of the planner."""
    out: Path
    """Folder for the results; refused if it holds an earlier result."""

    def run(self) -> int:
        """Plan, draw, and print the verdict."""
        from emu_embodied.envs.registry import check_env_id, make

        check_env_id(self.env)  # before anything that takes seconds to import
        from tqdm import tqdm

        from emu_embodied.policies.episode import run_episode
        from emu_embodied.policies.registry import check_fits, make_policy
        from emu_embodied.policies.subgoals import SubgoalPolicy
        from emu_embodied.provenance import make_meta
        from emu_embodied.records import Transition
        from emu_embodied.viz.report import write_plan_report
        from emu_embodied.world_model import WorldModel

        if (self.out / "result.json").exists():
            raise ValueError(f"{self.out} holds a result already: give another --out")
        if self.subgoal_model is not None and not self.subgoals:
            raise ValueError("--subgoal-model is for --subgoals: add it")
        if self.subgoals and self.policy == "shooting":
            raise ValueError("--subgoals is for the imagined and true policies; try --planner shooting")
        name = {"imagined": "subgoals", "true": "true_subgoals"}[self.policy] if self.subgoals else self.policy
        spec = self._spec(name)
        world = WorldModel.from_pretrained(self.checkpoint, device=spec.device) if spec.needs_model else None
        if world is None:
            simulator = make(self.env)
        else:
            simulator = make(self.env, image_size=world.config.image_size)
            check_fits(world, simulator)
        asked = None if world is None else self._asked(world, spec.device)
        policy = make_policy(spec, simulator, seed=self.seed, world_model=world, subgoal_model=asked, record=True)
        blocks = simulator.max_episode_steps // simulator.block
        with tqdm(total=blocks, desc="plan and act", unit="block") as progress:

            def count(transition: Transition) -> None:
                if isinstance(policy, SubgoalPolicy):
                    progress.set_postfix_str(policy.doing, refresh=False)
                progress.update()

            trace = run_episode(
                simulator,
                policy,
                seed=self.seed,
                env_id=self.env,
                policy_name=name,
                on_block=count,
            )
        simulator.close()
        data_hash = None if world is None else world.config.data_hash
        files = write_plan_report(trace, self.out, make_meta(seed=self.seed, data_hash=data_hash))
        for number, subgoal in enumerate(trace.subgoals, 1):
            print(f"  {number}. {subgoal.text}: {subgoal.outcome} after {subgoal.blocks} blocks")
        print(trace.verdict + (f"; {trace.ended}" if trace.ended else ""))
        for file in files:
            print(f"  {file}")
        return 0

    def _asked(self, world: WorldModel, device: str) -> SubgoalModel | None:
        """The model of ``--subgoal-model``."""
        if self.subgoal_model is None:
            return None
        from emu_embodied.interleaved import InterleavedModel
        from emu_embodied.prompted_subgoals import PromptedSubgoals

        model = InterleavedModel.from_pretrained(self.subgoal_model, device=device)
        return PromptedSubgoals(model, world.encode_frames, world.config.cameras[0])


@dataclass(frozen=True, kw_only=True)
class Bench(Search):
    """Measure how often policies succeed: rows with Wilson 95 % intervals, as JSON and as a table.

    A file that exists is completed: rows that it holds are not measured again, and rows of other settings stay.
    """

    protocol: str = ""
    """A published benchmark by its own rule, instead of --env: p1, p2, p3 or p5. Its rows bring their own objectives,
    and are measured episode by episode, so that a run that was stopped goes on."""
    checkpoint: str = ""
    """A shipped name or a checkpoint folder; nano if left out, but with --protocol none: learned rows are not run."""
    env: str = ""
    """Environment id, or several with commas between."""
    suite: str = ""
    """All of a suite instead: panda, metaworld, pusht, fetch, ogbench, panda-gym, libero-goal (-spatial, -10 ...)."""
    policy: str = ""
    """random, scripted, token, shooting, imagined, true, subgoals or true_subgoals; or several with commas between. Of
    a protocol: rows of its table, all if left out."""
    stream: Literal["pictures", "numbers"] = "pictures"
    """What is imagined: frames and numbers, or numbers alone, which costs a fifth, where the checkpoint knows them."""
    temperature: float = 0.0
    """At which the token policy draws its action tokens; 0 takes the most likely."""
    episodes: int | None = None
    """Episodes of a row; 100, or as many as the protocol asks for."""
    seed: int = 0
    """First reset seed; the others follow."""
    workers: int = 2
    """Processes of one thread each."""
    max_minutes: float | None = None
    """Stop a protocol after this time, with what there is; the same command goes on [min]."""
    json: Path
    """File for the rows."""

    def run(self) -> int:
        """Measure."""
        from emu_embodied.envs.registry import make
        from emu_embodied.policies.evaluate import bench, format_table, read_results, untouched, write_results
        from emu_embodied.policies.token import ActingSettings
        from emu_embodied.provenance import make_meta
        from emu_embodied.world_config import WorldModelConfig, checkpoint_folder

        if self.episodes is not None and self.episodes < 1:
            raise ValueError(f"--episodes is {self.episodes}, it has to be at least 1")
        acting = ActingSettings(temperature=self.temperature)
        if self.protocol:
            return self._run_protocol(replace(self._spec("imagined"), acting=acting, stream=self.stream))
        if self.max_minutes is not None:
            raise ValueError("--max-minutes is for --protocol: without it a run goes on row by row")
        if not self.policy:
            raise ValueError("give --policy, or --protocol")
        episodes = 100 if self.episodes is None else self.episodes
        env_ids = named_envs(self.env, self.suite)
        specs = [self._spec(name.strip()) for name in self.policy.split(",")]
        policies = [replace(spec, acting=acting, stream=self.stream) for spec in specs]
        kept = read_results(self.json) if self.json.exists() else []
        others = untouched(kept, env_ids, policies, self.seed)
        data_hash, simulators = None, partial(make)
        if any(spec.needs_model for spec in policies):
            world = WorldModelConfig.load(checkpoint_folder(policies[0].checkpoint) / "world.json")
            data_hash, simulators = world.data_hash, partial(make, image_size=world.image_size)
        meta = make_meta(seed=self.seed, data_hash=data_hash)
        rows = bench(
            env_ids,
            policies,
            episodes=episodes,
            seed=self.seed,
            make_simulator=simulators,
            workers=self.workers,
            kept=kept,
            on_row=lambda done: write_results(self.json, [*others, *done], meta),
        )
        write_results(self.json, [*others, *rows], meta)
        print(format_table([*others, *rows]))
        return 0

    def _run_protocol(self, template: PolicySpec) -> int:
        """Measure the rows of a protocol's table."""
        from emu_embodied.envs.registry import check_env_id
        from emu_embodied.experiments.protocols import find_protocol
        from emu_embodied.experiments.protocols.runner import Run, format_rows, load_model, run_protocol
        from emu_embodied.provenance import make_meta

        if self.env or self.suite:
            raise ValueError("a protocol says which environments it is about: leave --env and --suite out")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"--max-minutes is {self.max_minutes}, it has to be above 0")
        protocol = find_protocol(self.protocol)
        for env_id in protocol.env_ids:
            check_env_id(env_id)
        names = [name.strip() for name in self.policy.split(",")] if self.policy else []
        controls = [protocol.equip(control, template, self._budget()) for control in protocol.choose(names)]
        model = load_model(self.checkpoint) if self.checkpoint else None
        meta = make_meta(seed=self.seed, data_hash=None if model is None else model.config.data_hash)
        run = Run(episodes=self.episodes, seed=self.seed, workers=self.workers, max_minutes=self.max_minutes)
        rows = run_protocol(protocol, controls, run, self.json, meta, model=model)
        print(format_rows(rows))
        return 0
