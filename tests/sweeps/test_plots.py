import math
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
from matplotlib.image import imread

from sweeps.plots import RunCourse, diagnostics_figure


def course(**changes):
    early = {"reach/q_mean": -2.0, "reach/share": 0.1}
    late = {
        "reach/q_mean": 1000.0, "reach/share": 0.3, "reach/share_control": 0.01, "reach/penalty_edge": 5.0,
        "reach/penalty_within": 1.0, "reach/q_step_01": 10.0, "reach/q_step_02": 30.0, "reach/q_step_02_edge": 50.0,
        "reach/q_step_02_within": 20.0,
    }  # fmt: skip
    content = {
        "name": "t000-s0", "updates": [1000, 2000, 3000], "metrics": [early, late, late],
        "values": [(1000, 5.0), (2000, 60.0)], "expert_value": 100.0, "value_name": "score",
    }  # fmt: skip
    return RunCourse(**{**content, **changes})


def lines(axes):
    """What is drawn, by label: points (x, y)."""
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def test_the_panels_show_the_numbers():
    mean_q, by_step, share, penalty, score = diagnostics_figure(course()).axes
    assert lines(mean_q)["mean Q"] == [(2000, 3.0), (3000, 3.0)]  # of what is not positive there is no logarithm
    assert [y for _, y in lines(mean_q)["value of an expert"]] == [2.0, 2.0]
    assert lines(by_step)["within reach"] == [(1, 10.0), (2, 20.0)]
    assert lines(by_step)["edge of reach"] == [(2, 50.0)]
    assert lines(share)["beyond the threshold, last step"] == [(1000, 0.1), (2000, 0.3), (3000, 0.3)]
    assert lines(share)["beyond it, other steps"] == [(2000, 0.01), (3000, 0.01)]
    assert lines(penalty)["edge of reach"] == [(2000, 5.0), (3000, 5.0)]
    assert (score.get_title(), list(lines(score).values())) == ("score", [[(1000, 5.0), (2000, 60.0)]])


def test_steps_are_joined_in_their_order():
    long = {f"reach/q_step_{step:02d}": float(step) for step in (1, 50, 100)}
    _, by_step, *_ = diagnostics_figure(course(metrics=[*course().metrics[:-1], long])).axes
    assert lines(by_step)["within reach"] == [(1, 1.0), (50, 50.0), (100, 100.0)]


def errors():
    """Of a filtered model, at the last evaluation."""
    late = {
        "model/rmse_step_1": 0.1, "model/rmse_step_10": 2.0, "model/rmse_filtered_step_1": 0.05,
        "model/rmse_filtered_step_10": 1.0, "model/rmse_survivors_step_10": 0.5, "model/one_step_error_step_1": 0.1,
        "model/rmse_survivors_unfiltered_step_10": 0.8, "model/reward_error_correlation": -0.456,
    }  # fmt: skip
    return course(metrics=[course().metrics[0], course().metrics[1], {**course().metrics[2], **late}])


def test_errors_of_the_model_have_a_panel():
    *_, panel = diagnostics_figure(errors()).axes
    shown = lines(panel)
    assert shown["rollout, unfiltered"] == [(1, -1.0), (10, math.log10(2.0))]
    assert shown["filtered, nothing cut"] == [(1, math.log10(0.05)), (10, 0.0)]
    assert shown["filtered, survivors"] == [(10, math.log10(0.5))]
    assert shown["unfiltered, survivors' starts"] == [(10, math.log10(0.8))]
    assert shown["one step, unfiltered"] == [(1, -1.0)]
    assert "one step, filtered" not in shown
    assert panel.get_title() == "error of the model, at 3000 updates"


def test_candidates_have_a_panel():
    samples = {"model/sample_dynamics_reward": [0.4, 0.9], "model/sample_log10_error": [-1.0, -2.0]}
    figure = diagnostics_figure(replace(errors(), samples=samples))
    *_, panel = figure.axes
    assert len(figure.axes) == 7
    assert [list(line.get_xydata().tolist()) for line in panel.get_lines()] == [[[-1.0, 0.4], [-2.0, 0.9]]]
    assert panel.get_title() == "candidates, at 3000 updates: rank correlation -0.46"


def test_a_run_on_synthetic_data_has_panels_of_its_own():
    early = {"synthetic/log_likelihood": -5.0, "synthetic/dynamics_error": 1.0}
    late = {
        "synthetic/log_likelihood": -3.0, "synthetic/log_likelihood_dataset": -6.0, "synthetic/dynamics_error": 0.1,
        "synthetic/dynamics_error_median": 0.01, "synthetic/dynamics_error_median_dataset": 0.0,
        "synthetic/dynamics_error_step_1": 0.01, "synthetic/dynamics_error_step_31": 0.1,
        "synthetic/dynamics_error_median_step_31": 0.001,
    }  # fmt: skip
    figure = diagnostics_figure(course(metrics=[early, late, late], expert_value=None))
    score, likelihood, error, by_step = figure.axes
    assert list(lines(score).values()) == [[(1000, 5.0), (2000, 60.0)]]
    assert lines(likelihood) == {
        "synthetic actions": [(1000, -5.0), (2000, -3.0), (3000, -3.0)],
        "the dataset's actions": [(2000, -6.0), (3000, -6.0)],
    }
    assert lines(error) == {"mean": [(1000, 0.0), (2000, -1.0), (3000, -1.0)], "median": [(2000, -2.0), (3000, -2.0)]}
    assert lines(by_step) == {"mean": [(1, -2.0), (31, -1.0)], "median": [(31, -3.0)]}
    # where nothing steps the true dynamics there is no error to show
    assert len(diagnostics_figure(course(metrics=[{"synthetic/log_likelihood": -5.0}] * 3)).axes) == 2


@pytest.mark.parametrize(
    "changes", [{}, {"expert_value": None}, {"metrics": [{"reach/q_mean": -1.0}] * 3, "values": []}]
)
def test_the_file_is_a_png_of_the_panels_size(tmp_path, changes):
    path = tmp_path / "diagnostics.png"
    diagnostics_figure(course(**changes)).savefig(path, format="png", dpi=100)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1300, 700)
    image = imread(path)
    for top in (60, 400):  # a panel's ink in every place but the last
        for left in (0, 430, 860):
            drawn = image[top : top + 300, left : left + 430, :3].min() < 0.5
            assert drawn == ((top, left) != (400, 860))


def test_matplotlib_is_imported_when_a_figure_is_drawn():
    code = "import sys, sweeps.plots, sweeps.summary; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
