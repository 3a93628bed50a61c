import numpy as np

from sweeps.plots_refrigerator import ControllerCourse, Curve, Plane, RefrigeratorFigure, draw_refrigerator


def content() -> RefrigeratorFigure:
    rows = np.zeros((3, 2))
    rows[1, 0] = 50
    plain, filtered = np.full((3, 2), 2.0), np.full((3, 2), 0.5)
    plane = Plane([0.0, 1.0, 2.0], [0.0, 5.0], rows, {"plain": plain, "chosen": filtered}, plain, filtered)
    rmse = {"plain": np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]]), "left": np.array([[1.0, np.nan]] * 3)}
    totals = {"plain": [1.5, 3.5, 7.0], "left": [1.0, np.nan, 1.0]}
    share = np.array([[1.0, 0.0], [1.0, 0.5], [0.4, 0.1]])
    courses = [ControllerCourse(name, ([0.0, 1.0], [5.0, 0.0]), rmse, totals, share) for name in ("a", "b", "c")]
    curve = Curve("far", [-1.0, 0.0, 1.0], np.array([[0.4, 1.0, 0.4], [0.4, 1.2, 0.6]]))
    return RefrigeratorFigure("title", ("plain", "chosen"), plane, courses, [curve], 0.6)


def lines(axes):
    return {line.get_label(): [y for _, y in zip(*line.get_data(), strict=True)] for line in axes.get_lines()}


def test_the_panels_show_the_numbers(tmp_path):
    figure = draw_refrigerator(content())
    panels = {axes.get_title(): axes for axes in figure.axes}
    (gain,) = panels["log2 of error, chosen / plain"].collections[0].get_array().ravel()[:1]
    assert gain == -2.0
    errors = lines(panels["RMSE by step: b"])
    assert errors["plain"] == [3.0, 4.0]
    assert errors["left"] == [1.0]  # where no rollout is left there is no error
    np.testing.assert_allclose(lines(panels["share of rollouts not cut (below 0.6)"])["a"], [0.8, 0.2])
    np.testing.assert_allclose(lines(panels["dynamics reward of T', mean of the seeds"])["far"], [0.4, 1.1, 0.5])
    figure.savefig(tmp_path / "figure.png")
