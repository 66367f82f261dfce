"""What a plan costs, before it is run: epsilon, noise or steps, as numbers and as a plot.

python -m dpengine.account --noise-multiplier 1 --sampling-rate 0.01 --num-steps 1000 --delta 1e-5
python -m dpengine.account --epsilon 2 --sampling-rate 0.01 --num-steps 1000 --plot epsilon.png
python -m dpengine.account --epsilon 2 --sampling-rate 0.01 --noise-multiplier 1
python -m dpengine.account --runs runs/digits-001 runs/digits-002

Runs on one data set compose, and `--runs` says at what cost, each with all of its planned steps:
where a run stopped may have been chosen by what it gave out. Many runs of which only the best is
kept cost as much: the smaller price of repeat-and-select (Papernot and Steinke, arXiv 2110.03620)
is for a number of runs that is drawn secretly and for a choice that releases nothing else. This
tool draws no such number, so it does not offer that price.
"""

if __name__ == "__main__":  # before torch is loaded
    from .threads import sleep_soon

    sleep_soon()


import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import accounting, cli, durable, ledger, run_folder
from .accounting import EPS_ERROR, AccountingError, Charge, Epsilon
from .errors import PrivacyError, positive, positive_int, probability
from .plan import Adjacency, PrivacyPlan, adjacency_of_all
from .run_folder import RunFolder
from .settings import UserPath

_MAX_STEPS = 10**7
_PLOTTED = 20
_PLOT_ERROR = 0.003


@dataclass(frozen=True)
class Questions:
    """Give two of noise multiplier, number of steps and epsilon; the third is the answer.

    With all three, whether the plan keeps to the budget. Or give the folders of runs.
    """

    noise_multiplier: float | None = None
    """Standard deviation of the noise over the bound of one record's contribution."""
    num_steps: int | None = None
    """Noisy updates of the weights."""
    epsilon: float | None = None
    """The budget."""
    sampling_rate: float = 1.0
    """Probability with which each record enters a step."""
    delta: float = 1e-4
    """Delta of the claim, the tail of the noise generator included; below 1 / dataset size."""
    adjacency: Adjacency = "add-remove"
    """Neighbours. Zero-out costs the same as add-remove, replace-one more. Runs have their own."""
    trainable_parameters: int = 1_000_000
    """Values that get noise in each step; they enter the tail of the noise generator alone."""
    runs: tuple[UserPath, ...] = ()
    """Folders of runs on one data set: epsilon of each at its own delta, and of all together at the
    sum of these."""
    plot: UserPath | None = None
    """A new PNG: epsilon against steps, with the budget."""

    def check(self) -> None:
        """Raise ValueError for a number out of range, or where nothing can be answered."""
        probability(sampling_rate=self.sampling_rate)
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie between 0 and 1, got {self.delta}")
        positive_int(trainable_parameters=self.trainable_parameters)
        asked = (self.noise_multiplier, self.num_steps, self.epsilon)
        if self.runs and any(value is not None for value in (*asked, self.plot)):
            raise ValueError("runs have their own plans: give --runs alone")
        if not self.runs and sum(value is not None for value in asked) < 2:
            raise ValueError(
                "give two of --noise-multiplier, --num-steps and --epsilon, or --runs FOLDER ..."
            )
        if self.noise_multiplier is not None:
            positive(noise_multiplier=self.noise_multiplier)
        if self.num_steps is not None:
            positive_int(num_steps=self.num_steps)
        if self.epsilon is not None:
            positive(epsilon=self.epsilon)
        if self.plot is not None:
            _check_plot(Path(self.plot))


@dataclass(frozen=True)
class Cost:
    """ε of any number of steps with one noise multiplier: the planner's one question."""

    questions: Questions
    noise_multiplier: float

    def __call__(self, num_steps: int, eps_error: float = EPS_ERROR) -> Epsilon:
        """Bounds at the questions' δ, the tail of the noise charged."""
        asked = self.questions
        return accounting.spent(
            asked.sampling_rate,
            self.noise_multiplier,
            num_steps,
            asked.delta,
            asked.trainable_parameters,
            asked.adjacency,
            eps_error=eps_error,
        )


def account(questions: Questions) -> int:
    """Run the command. Returns the exit status."""
    questions.check()
    if questions.runs:
        print(_runs_lines(questions))
        return 0
    sigma = questions.noise_multiplier
    if sigma is None:
        sigma = accounting.calibrate_noise_multiplier(
            questions.epsilon,
            questions.delta,
            questions.sampling_rate,
            questions.num_steps,
            questions.trainable_parameters,
            questions.adjacency,
        )
    cost = Cost(questions, sigma)
    num_steps = questions.num_steps
    if num_steps is None:
        num_steps = most_steps(lambda steps: cost(steps).upper, questions.epsilon)
    print(_answer(questions, sigma, num_steps, cost(num_steps)))
    if questions.plot is not None:
        _save_plot(Path(questions.plot), cost, num_steps)
        print(f"plot: {questions.plot}")
    return 0


def most_steps(upper: Callable[[int], float], budget: float) -> int:
    """The most steps whose ``upper`` is within ``budget``, by doubling and halving.

    Raises AccountingError where one step is above it, or ten million are not.
    """
    if upper(1) > budget:
        raise AccountingError(
            f"one step already costs epsilon {_up(upper(1))}, above the budget of {budget:g}; "
            "raise epsilon or the noise multiplier, or lower the sampling rate"
        )
    within = 1
    while upper(2 * within) <= budget:
        within *= 2
        if 2 * within > _MAX_STEPS:
            raise AccountingError(
                f"the budget allows more than {within:,} steps; lower epsilon or the noise "
                "multiplier"
            )
    above = 2 * within
    while above - within > 1:
        middle = (within + above) // 2
        within, above = (middle, above) if upper(middle) <= budget else (within, middle)
    return within


def _answer(questions: Questions, sigma: float, num_steps: int, bounds: Epsilon) -> str:
    text = (
        f"epsilon = {_up(bounds.upper)} at delta = {questions.delta!r} ({questions.adjacency}, "
        f"accountant {bounds.accountant})\n"
        f"noise multiplier {sigma!r}, sampling rate {questions.sampling_rate!r}, "
        f"{num_steps:,} steps"
    )
    if questions.epsilon is None:
        return text
    kept = "within" if bounds.upper <= questions.epsilon else "above"
    return f"{text}\n{kept} the budget of epsilon {questions.epsilon:g}"


def _runs_lines(questions: Questions) -> str:
    return cost_of_runs([Path(name) for name in questions.runs])


def cost_of_runs(folders: list[Path]) -> str:
    """What each run in ``folders`` claims at its own δ, and all of them together at the sum.

    A folder that is named twice, by whatever path, counts once.
    """
    lines, plans = [], []
    for folder in {folder.resolve(): folder for folder in folders}.values():
        plan, reserved = _read_run(RunFolder(folder))
        plans.append(plan)
        bounds = accounting.spent_together([_charge(plan)], plan.delta, plan.adjacency)
        lines.append(
            f"{cli.printable(str(folder))}: {_claim(bounds)} at delta = {plan.delta!r} "
            f"({plan.adjacency}, one {plan.unit}) for {plan.num_steps:,} planned steps, "
            f"{reserved:,} of them charged"
        )
    bounds, delta, adjacency = _together(plans)
    lines.append(f"together: {_claim(bounds)} at delta = {delta!r} ({adjacency})")
    return "\n".join(lines)


def cost_beside(folder: RunFolder) -> dict | None:
    """What the run in ``folder`` and those beside it on the same data cost together, for a report.

    None where there is no other. `epsilon` is None where the runs have no claim in common, or one
    of them cannot be read. Names of folders and public plans are all that is told.
    """
    found = run_folder.of_same_data(folder)
    if len(found) < 2:
        return None
    names = [path.name for path in found if path != folder.path.absolute()]
    cost = {"other_runs": names, "epsilon": None, "delta": None, "adjacency": None}
    try:
        plans = [_read_run(RunFolder(path))[0] for path in found]
        bounds, delta, adjacency = _together(plans)
    except (ValueError, PrivacyError):
        return cost
    epsilon = bounds.upper if math.isfinite(bounds.upper) else "inf"
    return cost | {"epsilon": epsilon, "delta": delta, "adjacency": adjacency}


def _together(plans: list[PrivacyPlan]) -> tuple[Epsilon, float, Adjacency]:
    """ε of all ``plans``, the δ that it holds at, and what they protect together."""
    if len({plan.unit for plan in plans}) > 1:
        raise ValueError(
            "runs that protect records and runs that protect units have no claim in common; give "
            "those of one kind"
        )
    adjacency = adjacency_of_all(plan.adjacency for plan in plans)
    delta = math.fsum(plan.delta for plan in plans)
    if delta >= 1:
        raise ValueError(
            f"the deltas of the runs add up to {delta:g}, at which nothing can be claimed of all "
            "together; give fewer runs"
        )
    return accounting.spent_together(list(map(_charge, plans)), delta, adjacency), delta, adjacency


def _charge(plan: PrivacyPlan) -> Charge:
    # All planned steps: where to stop may have been chosen by what came out.
    return Charge(plan.sampling_rate, plan.noise_multiplier, plan.num_steps, plan.noised_values)


def _read_run(folder: RunFolder) -> tuple[PrivacyPlan, int]:
    if not folder.ledger.exists():
        raise ValueError(f"{str(folder.path)!r} is not the folder of a run: it has no ledger")
    record = ledger.read(folder.ledger)
    return record.plan, record.reserved


def _claim(bounds: Epsilon) -> str:
    if math.isinf(bounds.upper):
        return "not private, trained without noise"
    return f"epsilon = {_up(bounds.upper)} by {bounds.accountant}"


def _up(epsilon: float) -> str:
    return f"{math.ceil(epsilon * 1e4) / 1e4:.4f}"


def _check_plot(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise ValueError(f"plot must be the name of a PNG file, got {str(path)!r}")
    if path.exists() or not path.absolute().parent.is_dir():
        raise ValueError(f"plot must be a new file in a folder that exists, got {str(path)!r}")
    durable.check_writable("plot", path.parent)


def _save_plot(path: Path, cost: Cost, num_steps: int) -> None:
    """The certified bound from no step to ``num_steps``; closer together where it bends."""
    from matplotlib.figure import Figure

    asked = cost.questions
    steps = sorted({round(num_steps * (i / _PLOTTED) ** 2) for i in range(_PLOTTED + 1)})
    epsilons = [cost(n, EPS_ERROR if n == num_steps else _PLOT_ERROR).upper for n in steps]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, epsilons, color="tab:blue", label="epsilon spent, upper bound")
    axes.plot(num_steps, epsilons[-1], "o", color="tab:blue")
    if asked.epsilon is not None:
        axes.axhline(asked.epsilon, color="tab:red", linestyle="--", label="budget")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("steps")
    axes.set_ylabel(f"epsilon at delta = {asked.delta:g}")
    axes.set_title(
        f"noise multiplier {cost.noise_multiplier:.4g}, sampling rate {asked.sampling_rate:.4g}, "
        f"{asked.adjacency}",
        fontsize=11,
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=160)


def main(args: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return cli.run("python -m dpengine.account", Questions, account, args)


if __name__ == "__main__":
    raise SystemExit(main())
