"""What benchmarks/pgd_guidance.py makes of rows: whose trajectory they are, means, medians, intervals, the figure."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from agents.randomness import generator
from agents.replay import transition_rows
from agents.trajectories import Trajectories
from benchmarks import pgd_guidance as bench
from benchmarks.pgd_guidance import Arm, Part
from envs.errors import UserError
from envs.policies import load_policy
from sweeps.plots_guidance import draw_guidance


def trajectories(count=5, length=4, ends=()):
    """States that count on by one from a random start; terminals at (trajectory, row) pairs."""
    start = torch.rand(count, 1, 2, generator=generator(0, "test"))
    obs = start + torch.arange(length).view(1, -1, 1)
    done = torch.zeros(count, length)
    for at in ends:
        done[at] = 1.0
    return Trajectories(obs, obs[..., :1], done + 5.0, done)


def test_rows_of_trajectories_end_with_the_first_terminal():
    part = Part.of_trajectories(trajectories(3, ends=[(1, 0)]))
    assert part.trajectory_R.tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert part.steps_R.tolist() == [1, 2, 3, 1, 1, 2, 3]
    assert part.rows_RW.shape == (7, 2 * 2 + 1 + 2)


def test_rows_of_rollouts_find_their_trajectories_again():
    """Step by step, as rollouts give them, and some of them gone from the second step on."""
    part = Part.of_trajectories(trajectories(5, ends=[(1, 0), (3, 1)]))
    order = np.lexsort((part.trajectory_R, part.steps_R.numpy()))
    found = Part.of_rollouts(part.rows_RW[order], part.steps_R[order], 2)
    assert found.trajectory_R.tolist() == part.trajectory_R[order].tolist()
    assert found.trajectory_R.tolist() == [0, 1, 2, 3, 4, 0, 2, 3, 4, 0, 2, 4]


def arm(seeds=2, count=40):
    """Two rows for each trajectory."""
    number = np.arange(seeds * count).repeat(2)
    rows = transition_rows(*(torch.zeros(len(number), *shape) for shape in ((2,), (1,), (), (), (2,))))
    steps = torch.tensor([1, 2]).repeat(seeds * count)
    return Arm(rows, steps, number, np.arange(seeds).repeat(count))


def test_intervals_are_those_of_whole_trajectories():
    """Both rows of a trajectory are alike, so twice as many rows say nothing more."""
    made, rng = arm(), np.random.default_rng(0)
    of_trajectory = rng.normal(3.0, 1.0, len(made.seed_N))
    estimate = bench.mean_of(of_trajectory.repeat(2), made)
    assert estimate.value == pytest.approx(of_trajectory.mean())
    low, high = estimate.interval
    assert high - low == pytest.approx(2 * 1.96 * of_trajectory.std() / math.sqrt(80), rel=0.1)
    means = [of_trajectory[:40].mean(), of_trajectory[40:].mean()]
    half = 12.706 * np.std(means, ddof=1) / math.sqrt(2)  # t of one degree of freedom
    assert estimate.interval_seeds == pytest.approx((np.mean(means) - half, np.mean(means) + half), rel=1e-3)
    # rows that are not numbers are left out, a single seed has no interval over seeds
    alone = replace(made, seed_N=np.zeros(80, np.int64))
    holes = np.where(np.arange(160) % 2, np.nan, of_trajectory.repeat(2))
    assert bench.mean_of(holes, alone).value == pytest.approx(of_trajectory.mean())
    assert set(bench.mean_of(holes, alone).fields("x")) == {"x", "x_interval"}


def test_medians_do_not_care_for_the_tail():
    made = arm()
    values = np.arange(160.0)
    values[-20:] = 1e9
    estimate = bench.median_of(values, made)
    assert estimate.value == 79.5
    assert 50 < estimate.interval[0] < 79.5 < estimate.interval[1] < 110


def test_a_rise_is_one_between_pairs():
    """Trajectories differ much more from each other than each from its pair."""
    made, rng = arm(), np.random.default_rng(0)
    base = rng.normal(0.0, 10.0, 160)
    rise = bench.rise_of(base + rng.normal(0.1, 0.05, 160), made, base, made)
    assert rise.interval[0] == pytest.approx(0.1, abs=0.02)
    assert rise.value == pytest.approx(0.1, abs=0.01)
    assert rise.interval[1] < 0.12


def test_marginals_are_compared_in_their_own_deviations():
    real = torch.randn(4000, 3, generator=generator(0, "test")) * torch.tensor([1.0, 10.0, 1.0])
    moved = real + torch.tensor([0.0, 5.0, 0.0])
    assert bench.marginal_distance(real, real, 2) == 0.0
    assert bench.marginal_distance(moved, real, 2) == pytest.approx(0.25, rel=0.05)  # half of one of two columns


def test_frozen_policies_are_the_actors_without_noise():
    actor = bench.frozen_policy("hopper-medium")
    obs = torch.randn(6, 11, generator=generator(0, "test"))
    expected = load_policy("hopper-medium").act(obs.numpy(), None)
    np.testing.assert_allclose(actor.sample(obs.unsqueeze(0), torch.zeros(1, 6, 3))[0].numpy(), expected, atol=1e-5)


def lines():
    def line(case, **more):
        interval = {f"{name}_interval": [0.5, 2.0] for name in ("log_likelihood", "dynamics_error_median")}
        return {
            "benchmark": "pgd_guidance", "case": case, "log_likelihood": 1.0, "dynamics_error": 1.0,
            "dynamics_error_median": 1.0, "dynamics_error_interval": [0.9, 1.1], "log_likelihood_dataset": -1.0,
            "dynamics_error_interval_seeds": [-5.0, 7.0], "error_median_by_step": [0.1, None, 0.3],
            "open_loop_median_by_step": [0.1, 0.4, 0.9], **interval, **more,
        }  # fmt: skip

    guided = [line(f"hopper/guided/medium/code/{x:g}", **{"lambda": x}) for x in (0.0, 1.0)]
    score = line("hopper/guided/medium/score/4", **{"lambda": 4.0})
    steps = [line(f"hopper/steps/1/{n}", steps=n) for n in (16, 32)]
    return [line("hopper/ensemble/medium"), line("hopper/windows/medium"), *guided, score, *steps]


def test_the_figure_shows_the_lines(tmp_path):
    likelihood, error, by_step, by_steps = draw_guidance(lines()).axes
    shown = {c.get_label(): c[0].get_xydata().tolist() for c in error.containers}
    assert shown == {"medium, rule code": [[0, 1], [1, 1]], "medium, rule score": [[0, 1], [4, 1]]}
    assert len(likelihood.containers) == 2
    assert [x.get_label() for x in by_step.get_lines()[::2]] == [
        "ensemble",
        "diffusion, lambda 0",
        "diffusion, lambda 1",
    ]
    assert by_step.get_lines()[1].get_xydata().tolist() == [[1, 0.1], [2, 0.4], [3, 0.9]]
    assert by_step.get_lines()[0].get_xydata().tolist() == [[1, 0.1], [3, 0.3]]
    assert by_steps.containers[0][0].get_xydata().tolist() == [[16, 1], [32, 1]]


def test_there_must_be_results_to_draw(tmp_path):
    with pytest.raises(UserError, match="no results"):
        bench.draw(tmp_path / "none.jsonl", tmp_path / "figure.png")
    common = dict.fromkeys(("value", "unit", "reference", "ratio", "threads", "command", "machine"))
    text = "".join(json.dumps({**common, **line}) + "\n" for line in lines())
    (tmp_path / "some.jsonl").write_text(text)
    bench.draw(tmp_path / "some.jsonl", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
