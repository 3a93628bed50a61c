import struct
import subprocess
import sys

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
