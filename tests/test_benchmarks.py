"""Benchmarks: their arithmetic is that of the code they time, and no failed run replaces earlier results."""

import json
from dataclasses import fields, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from agents.dynamics import DynamicsConfig, EnsembleTrainer
from agents.method import TrainingData, load_method
from agents.replay import Replay, transition_rows
from benchmarks import (
    common,
    data_bad_inputs,
    data_collect,
    data_load,
    dynamics_reward,
    learner_speed,
    morec_scores,
    offlinerlkit_scores,
    pgd_scores,
    pgd_toy,
    run,
    study_hopper,
    true_dynamics,
    true_dynamics_speed,
    vgdf_scores,
    vgdf_speed,
)
from envs.errors import UserError
from envs.toys import Refrigerator
from orchestrator.config import load_config
from orchestrator.spool import RunInfo, RunSpool


def count_flops(work):
    """Of the matrix products that torch executes, oneDNN's linear included."""
    custom = {}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):

        def linear(x, weight, *args, out_shape, **kwargs):
            return 2 * out_shape.numel() * x[-1]

        custom[torch.ops.mkldnn._linear_pointwise] = linear
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", learner_speed.UPDATES)
@pytest.mark.parametrize("pack", [1, 3])
def test_the_counted_arithmetic_of_an_update_is_what_the_update_does(name, pack):
    """Otherwise the share of the machine's rate in the results is wrong: mend `sac_flops` (or its like) too."""
    case = learner_speed.UPDATES[name]
    replay = Replay(transition_rows(*learner_speed.hopper_shaped(1000)), pack, 0)
    updater = case.make(pack)
    work = learner_speed.work_of(updater, replay)
    for _ in range(updater.period):  # the first product of all is tried in several ways
        work()
    flops = [count_flops(work) for _ in range(updater.period)]
    assert sum(flops) / len(flops) / pack == pytest.approx(case.flops, rel=0.01)


def test_the_counted_arithmetic_of_an_ensemble_epoch_is_what_the_epoch_does():
    obs, action, reward, _, next_obs = learner_speed.hopper_shaped(1000)
    config = DynamicsConfig(ensemble_size=3, num_elites=2)
    trainer = EnsembleTrainer(obs, action, reward, next_obs, [config])

    def epoch():
        trainer.train_epoch(0)
        trainer.holdout_mse()

    counted = learner_speed.dynamics_flops(obs.shape[1], action.shape[1], 800, 200, config)
    assert count_flops(epoch) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(("case", "models"), [("ravl_rollout", 1), ("mopo_rollout", 7)])
def test_the_counted_arithmetic_of_a_rollout_is_what_it_does_and_few_rows_fall(case, models):
    method = learner_speed.rollout_method(case, 1000)
    work, made = learner_speed.rollout_work(method)
    executed = count_flops(work)
    assert 0.9 * 5 * 1000 < made[0] <= 5 * 1000
    assert len(method.replay.member_rows(0)) == made[0]
    widths = (learner_speed.OBSERVATION_DIM, learner_speed.ACTION_DIM)
    assert executed / made[0] == pytest.approx(learner_speed.rollout_flops(*widths, [256] * 3, models), rel=0.01)


@pytest.mark.slow
def test_a_pack_is_measured_beside_a_pack_of_one(capfd):
    words = ["--cases", "small_net", "--packs", "2", "--threads", "1", "--blocks", "2", "--seconds", "0.02"]
    assert learner_speed.main(words) == 0
    (text,) = capfd.readouterr().out.splitlines()
    line = common.parse_line(text, "learner_speed")
    assert (line["case"], line["pack"], line["threads"]) == ("small_net", 2, 1)
    assert line["ratio"] == pytest.approx(line["value"] / line["reference"], rel=1e-4)
    assert "pack of 1" in line["reference_is"]
    of_products = line["flops_per_update"] * line["value"] / (line["matrix_gflops"] * 1e9)
    assert line["share_of_matrix_rate"] == pytest.approx(of_products, rel=1e-4)
    assert line["matrix_gflops"] == max(line["matrix_rates"].values())


def test_a_collection_is_measured_beside_a_plain_loop(capfd):
    words = ["--robots", "hopper", "--workers", "0", "--rows", "300", "--blocks", "2", "--in-process"]
    assert data_collect.main(words) == 0
    (text,) = capfd.readouterr().out.splitlines()
    line = common.parse_line(text, "data_collect")
    assert (line["case"], line["env_id"], line["workers"], line["rows"]) == ("hopper/0", "Hopper-v5", 0, 300)
    assert line["ratio"] == pytest.approx(line["value"] / line["reference"], rel=1e-4)
    assert len(line["content_hash"]) == 64


def test_true_dynamics_are_measured_beside_loops_that_do_the_same(capfd):
    words = ["--robots", "hopper", "--threads", "2", "--starts", "20", "--steps", "3", "--blocks", "1"]
    assert true_dynamics_speed.main(words) == 0
    (text,) = capfd.readouterr().out.splitlines()
    line = common.parse_line(text, "true_dynamics_speed")
    assert (line["case"], line["env_id"], line["threads"], line["starts"]) == ("hopper/2", "Hopper-v5", 2, 20)
    assert line["ratio"] == pytest.approx(line["value"] / line["set_state_per_second"], rel=1e-4)
    assert line["with_resets_ratio"] > 0
    assert line["median_difference"] < 1e-12


def test_the_guidance_toy_is_held_against_what_its_cases_should_give(capfd):
    assert pgd_toy.main(["--samples", "300"]) == 0
    lines = [common.parse_line(text, "pgd_toy") for text in capfd.readouterr().out.splitlines()]
    assert [line["case"] for line in lines] == [case.name for case in pgd_toy.CASES]
    by_case = {line["case"]: line for line in lines}
    with_states = by_case["correlated, score rule, 64 steps"]
    assert with_states["reference"] == pytest.approx(2 * 25 / (25 + 1), rel=1e-4)  # the precisions are 25 and 1
    assert with_states["reference_state_mean"] == pytest.approx(0.8 * with_states["reference"], rel=1e-4)


@pytest.mark.slow
def test_loading_is_measured_cold_and_warm(capfd):
    assert data_load.main(["--rows", "2000", "--repeats", "1", "--no-minari"]) == 0
    lines = [common.parse_line(text, "data_load") for text in capfd.readouterr().out.splitlines()]
    assert [line["case"] for line in lines] == ["hdf5_cold", "cache_warm"]
    for line in lines:
        assert line["rows"] == 2000
        assert line["ratio"] == pytest.approx(line["value"] / line["reference"], rel=1e-3)


@pytest.mark.parametrize("case", ["truncated_file", "unknown_name"])
def test_a_bad_input_is_one_sentence_and_leaves_nothing(capfd, case):
    assert data_bad_inputs.main(["--cases", case]) == 0
    (text,) = capfd.readouterr().out.splitlines()
    line = common.parse_line(text, "data_bad_inputs")
    assert (line["input"], line["exit_code"], line["lines"], line["left_behind"]) == (case, 2, 1, [])


@pytest.fixture
def spool(tmp_path):
    spool = RunSpool(tmp_path, "t0000-s0")
    tags = {"environment": "Hopper-v5", "score_reference": "D4RL"}
    spool.start(RunInfo("t000-s0", {}, tags))
    spool.metrics(1000, {"train/q_mean": 5.0})
    spool.metrics(2000, {"train/q_mean": 900.0, "eval/score": 12.0})
    spool.start(RunInfo("t000-s0", {}, tags))  # killed and resumed: the last step comes again
    spool.metrics(2000, {"train/q_mean": 900.0, "eval/score": 12.0})
    return spool


def test_a_run_is_summarised_by_its_last_score_and_its_largest_value_estimate(spool):
    spool.metrics(3000, {"train/q_mean": 70.0, "eval/score": 30.0})
    spool.set_tags({"outcome": "finished"})
    spool.end("FINISHED")
    summary = true_dynamics.summary_of(spool.path)
    assert summary["normalized_score"] == 30.0
    assert (summary["mean_q"], summary["max_mean_q"], summary["updates"]) == (70.0, 900.0, 3000)
    assert summary["environment"] == "Hopper-v5"


def test_a_diverged_run_has_no_score(spool):
    spool.metrics(3000, {"train/q_mean": float("nan")})
    spool.set_tags({"outcome": "diverged"})
    spool.end("FAILED")
    summary = true_dynamics.summary_of(spool.path)
    assert summary["normalized_score"] is None
    line = common.record("true_dynamics", "base/s0", None, "score", 1.0, 1, "python", **summary)
    assert json.loads(json.dumps(line, allow_nan=False))["mean_q"] is None
    assert line["max_mean_q"] == 900.0


def fake_benchmark(monkeypatch, root, body):
    """Let `benchmarks.run` find a benchmark of ours."""
    (root / "benchmarks").mkdir()
    (root / "benchmarks" / "learner_speed.py").write_text(body)
    monkeypatch.setattr(run, "ROOT", root)
    monkeypatch.delenv("PYTHONPATH", raising=False)


LINE = json.dumps(dict.fromkeys(common.FIELDS, 1) | {"benchmark": "learner_speed"})


def test_results_are_replaced_by_those_of_a_run_that_ended_well(monkeypatch, tmp_path, capfd):
    fake_benchmark(monkeypatch, tmp_path, f"import sys\nprint({LINE!r})\nprint('by the way', file=sys.stderr)\n")
    (tmp_path / "learner_speed.jsonl").write_text("old\n")
    assert run.main(["learner_speed", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "learner_speed.jsonl").read_text() == LINE + "\n"
    assert capfd.readouterr().out == LINE + "\n"


@pytest.mark.parametrize(
    "body", [f"print({LINE!r})\nraise SystemExit(1)", "print('42 updates per second')", "print('{}')", "pass"]
)
def test_results_are_kept_when_a_run_fails_or_prints_something_else(monkeypatch, tmp_path, body):
    fake_benchmark(monkeypatch, tmp_path, body)
    (tmp_path / "learner_speed.jsonl").write_text("old\n")
    assert run.main(["learner_speed", "--out", str(tmp_path)]) == 1
    assert (tmp_path / "learner_speed.jsonl").read_text() == "old\n"
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".jsonl"] == ["learner_speed.jsonl"]


def test_a_line_of_another_benchmark_is_refused():
    with pytest.raises(UserError, match="true_dynamics printed a line of 'learner_speed'"):
        common.parse_line(LINE, "true_dynamics")


def test_the_cases_share_one_dynamics_ensemble_and_differ_where_they_should():
    args = true_dynamics.build_parser().parse_args(["--updates", "20000", "--hidden", "256", "256"])
    cases = true_dynamics.cases_of(args)
    assert [case.name for case in cases if case.dataset.startswith("embedded/hopper")] == [
        "hopper-medium-snapshots/learned/base", "hopper-medium-snapshots/learned/ravl",
        "hopper-medium-snapshots/learned/mopo", "hopper-medium-snapshots/true/base",
        "hopper-medium-snapshots/true/ravl",
    ]  # fmt: skip
    configs = {case: true_dynamics.load_config([], true_dynamics.overrides(case, args)) for case in cases}
    for case, config in configs.items():
        assert config.method.dynamics == configs[cases[0]].method.dynamics
        assert config.method.model_quality == case.quality
        assert (config.method.num_critics, config.method.eta) == {"ravl": (10, 1.0)}.get(case.method, (2, 0.0))
        assert config.method.hidden == [256, 256]
        assert config.method.num_updates == 20000
        assert config.evaluation.every_epochs * config.method.updates_per_epoch == 5000


class _Judge:
    """Scores candidates by how near they are to what it is told."""

    def __init__(self, truth, sign):
        self.truth, self.sign = truth, sign

    def probability(self, state_action, next_obs_BCS):
        near = torch.exp(-(next_obs_BCS - self.truth.unsqueeze(1)).abs().sum(-1))
        return near if self.sign > 0 else 1 - near


@pytest.mark.parametrize("sign", [1, -1])
def test_a_reward_is_worth_what_the_candidate_of_its_choice_is(sign):
    draw = torch.Generator().manual_seed(0)
    obs, action, after = (torch.randn(50, 1, generator=draw) for _ in range(3))
    config = DynamicsConfig(hidden=[8], weight_decay=[0.0, 0.0], holdout_fraction=0.2)
    (ensemble,) = EnsembleTrainer(obs, action, torch.zeros(50), after, [config]).ensembles
    case = dynamics_reward.Transitions(obs, action, after)
    judge = _Judge(after, sign)
    found = dynamics_reward.judged(ensemble, judge, judge, case, torch.ones(1))
    assert found["correlation_within"] == pytest.approx(-sign, abs=1e-6)
    ratio = found["error"] / found["random_error"]
    assert ratio == pytest.approx(found["distilled_ratio"])
    assert (ratio == pytest.approx(found["oracle_ratio"])) is (sign > 0)
    assert found["oracle_ratio"] < found["central_ratio"] < 1.2
    assert found["cut_real"] == (0 if sign > 0 else 1)


def test_the_refrigerators_cases_follow_its_equations():
    env = Refrigerator()
    few = 20
    fresh = TrainingData(
        "offsweep/Refrigerator-v0",
        *(torch.rand(5_000, 1) for _ in range(2)),
        torch.zeros(1),
        torch.zeros(1),
        torch.zeros(1),
    )
    for case in dynamics_reward.refrigerator_cases(fresh).values():
        for obs, action, after in zip(*(x[:few] for x in case), strict=True):
            env.reset(seed=0)
            env._temperature, env._may_open = float(obs), False
            env._steps = 1  # no coin is thrown: the door stays shut
            told = env.step((action + 1).numpy() * Refrigerator.MAX_POWER / 2)[-1]
            assert told["temperature"] == pytest.approx(float(after), abs=1e-4)


def test_plain_and_filtered_methods_share_their_stages_and_differ_in_the_filter():
    words = ["--updates", "10000", "--hidden", "64", "64", "--length", "30", "--scorer", "distilled",
             "--dynamics-epochs", "15", "--reward-epochs", "3", "--rollout-batch", "5000", "--learning-rate", "0.001",
             "--mobile-updates", "5000", "--methods", *morec_scores.METHODS]  # fmt: skip
    args = morec_scores.build_parser().parse_args(words)
    cases = morec_scores.cases_of(args)
    methods = ["mopo", "mopo-long", "morec-mopo", "mobile", "mobile-long", "morec-mobile"]
    assert [case.name for case in cases[:6]] == [f"hopper-medium-snapshots/{name}" for name in methods]
    assert [case.filtered for case in cases[:6]] == [False, False, True] * 2
    configs = {case: morec_scores.load_config([], morec_scores.overrides(case, args)) for case in cases}
    for case, config in configs.items():
        m = config.method
        assert (m.filtered, m.dynamics.max_epochs, m.hidden) == (case.filtered, 15, [64, 64])
        assert m.num_updates == {"mopo": 10000, "mobile": 5000}[case.plain]
        long = case.method != case.plain
        assert (m.rollout_length, m.rollout_batch) == ((30, 1000) if long else (5, 5000))
        assert (m.actor_lr, m.critic_lr, m.alpha_lr) == (0.001, 0.001, 0.001)
        assert m.penalty_coef == configs[morec_scores.Case(case.dataset, case.plain)].method.penalty_coef
        assert config.evaluation.every_epochs * m.updates_per_epoch == 5000
        if case.filtered:
            assert (m.filter.scorer, m.dynamics_reward.max_epochs) == ("distilled", 3)
    stages = [load_method(config.method_name).stages(config.method) for config in configs.values()]
    settings = [[(stage.kind, stage.settings) for stage in one.values()] for one in stages]
    assert all(one[0] == settings[0][0] for one in settings)
    rewards = [one[1] for one in settings if len(one) > 1]
    assert len(rewards) == len(cases) / 3
    assert all(reward == rewards[0] for reward in rewards)


def test_the_last_errors_of_a_run_are_read_by_step(spool):
    for step, error in ((1000, 5.0), (2000, 2.0)):
        spool.metrics(step, {
            "model/rmse_step_10": error, "model/rmse_step_1": 1.0, "model/one_step_error_step_10": 0.5,
            "model/one_step_error": 0.25, "rollout/cut_share": 0.1 * error, "reach/share": 0.3,
        })  # fmt: skip
    assert morec_scores.last_values(spool.path) == {
        "rmse_by_step": {"rmse": {"1": 1.0, "10": 2.0}, "one_step_error": {"10": 0.5}},
        "model": {"one_step_error": 0.25}, "rollout": {"cut_share": 0.2},
    }  # fmt: skip


def test_a_mean_is_of_the_steps_that_every_seed_has():
    lines = [
        {"normalized_score": score, "rmse_by_step": {"rmse": errors}, "unit": "score", "threads": 1, "dataset": "d",
         "seed": seed, "updates": 10, "hidden": [64], "wall_s": 1.0, "environment": "e"}
        for seed, (score, errors) in enumerate([(10.0, {"1": 1.0, "50": 9.0}), (30.0, {"1": 3.0})])
    ]  # fmt: skip
    mean = morec_scores.mean_line(morec_scores.Case("d-v0", "morec-mopo"), lines, 10.0, "python")
    assert (mean["value"], mean["ratio"], mean["rmse_by_step"]) == (20.0, 2.0, {"rmse": {"1": 2.0}})
    lines[0]["normalized_score"] = None
    assert morec_scores.mean_line(morec_scores.Case("d-v0", "morec-mopo"), lines, 10.0, "python")["value"] is None


def test_scores_beside_offlinerlkits_are_means_over_seeds_and_a_diverged_run_has_none():
    runs = [{"seed": seed, "score": score, "curve": {"5": 1.0}} for seed, score in ((0, 1.0), (1, 4.0))]
    line = offlinerlkit_scores.line_of("hopper", "mopo", "offsweep", runs, 5.0, "command", updates=5)
    assert (line["case"], line["value"], line["ratio"]) == ("hopper/mopo/offsweep", 2.5, 0.5)
    assert line["std"] == pytest.approx(4.5**0.5, rel=1e-5)
    assert (line["seeds"], line["scores"], line["updates"]) == ([0, 1], [1.0, 4.0], 5)
    runs[0]["score"] = None
    assert offlinerlkit_scores.line_of("hopper", "mopo", "offsweep", runs, 5.0, "command")["mean"] is None


def test_both_implementations_are_trained_for_as_long_on_the_same_seeds():
    """A figure of theirs for another number of updates would stand beside nothing."""
    content = json.loads(offlinerlkit_scores.THEIRS.read_text())
    for one in content["runs"]:
        assert one["updates"] == offlinerlkit_scores.UPDATES[one["method"]]
    args = offlinerlkit_scores.build_parser().parse_args([])
    for robot, method in {(one["robot"], one["method"]) for one in content["runs"]}:
        seeds = sorted(o["seed"] for o in content["runs"] if (o["robot"], o["method"]) == (robot, method))
        assert seeds == list(range(args.seeds))
        config = load_config([], offlinerlkit_scores.overrides(robot, method, args))
        assert config.method.num_updates == offlinerlkit_scores.UPDATES[method]
        assert config.method.update_order == "critics-first"


def test_learners_with_a_synthetic_source_are_those_without_and_share_its_stage():
    words = ["--updates", "20000", "--hidden", "64", "64", "--trajectories", "100", "--refresh-every", "5000",
             "--diffusion", "features=32", "num_updates=500", "--dynamics-epochs", "3", "--coef", "0.5"]  # fmt: skip
    args = pgd_scores.build_parser().parse_args(words)
    cases = pgd_scores.cases_of(args)
    assert [case.name for case in cases[:2]] == [
        f"hopper-medium-snapshots/td3_bc/{name}" for name in ("data", "unguided")
    ]
    assert len(cases) == 2 * 2 * 4
    configs = {case: pgd_scores.load_config([], pgd_scores.overrides(case, args)) for case in cases}
    for case, config in configs.items():
        m, of_data = config.method, configs[replace(case, source="data")].method
        differing = {f.name for f in fields(m) if getattr(m, f.name) != getattr(of_data, f.name)}
        assert differing <= {"variant", "synthetic", "sampler", "guidance", "diffusion", "dynamics"}
        assert m.synthetic.source == {"data": "none", "pets": "ensemble"}.get(case.source, "diffusion")
        if case.source in ("guided", "unguided"):
            assert m.guidance.coef == (0.5 if case.source == "guided" else 0.0)
            assert (m.diffusion.features, m.diffusion.num_updates) == (32, 500)
            unguided = configs[replace(case, source="unguided")].method
            assert (m.diffusion, m.sampler, m.synthetic) == (unguided.diffusion, unguided.sampler, unguided.synthetic)


def test_a_full_run_of_vgdf_is_the_sum_of_its_parts():
    """The number of gradient steps is counted anew here: every refit's epochs times its minibatches."""
    lines = [{"case": f"refit/{rows}/float32", "value": 100.0} for rows in vgdf_speed.ROWS]
    rates = {"unfiltered": 200.0, "filtered": 50.0}
    lines += [{"case": f"update/{which}/1/float32", "value": rate} for which, rate in rates.items()]
    lines += [{"case": f"step/{domain}/float32", "value": 1000.0} for domain in ("source", "target")]
    hours = vgdf_speed.full_run(lines, "value", "float32")
    steps = 0
    for t in range(500, 1_000_001, 250):  # at t = 250 the source holds 251 rows, less than a batch
        rows = t // 10 + 1
        train = rows - rows // 10
        steps += (max(0, 5 - t // 150_000) + 2) * ((train + 255) // 256)
    assert steps == pytest.approx(2_284_868, rel=1e-3)  # counted independently of this project
    assert hours["refits"] == pytest.approx(steps / 100 / 3600)
    assert hours["updates"] == pytest.approx((100_000 / 200 + 900_000 / 50) / 3600)
    assert hours["environments"] == pytest.approx(1100 / 3600)
    assert hours["evaluations"] == pytest.approx(500 / 3600)


def vgdf_args(*words):
    return vgdf_scores.build_parser().parse_args(["--robots", "Hopper", "--scale", "0.1", *words])


def test_finetune_takes_the_source_steps_and_then_a_tenth_of_them_in_the_target():
    args = vgdf_args("--methods", "zero-shot")
    (case,) = [case for case in vgdf_scores.cases_of(args) if case.shift == "kinematic"]
    config = load_config([], vgdf_scores.overrides(case, args))
    m = config.method
    assert (m.num_updates, m.source_steps(m.num_updates), m.target_steps(m.num_updates)) == (110_000, 100_000, 10_000)
    assert m.target_steps(100_000) == 0
    assert m.updates_per_epoch * config.evaluation.every_epochs == 2_000
    alone = vgdf_scores.Case("Hopper", "kinematic", "target-only", "v5")
    m = load_config([], vgdf_scores.overrides(alone, args)).method
    assert (m.source_steps(m.num_updates), m.target_steps(m.num_updates)) == (0, 10_000)


def test_vgdfs_constants_in_steps_are_scaled_with_its_steps():
    args = vgdf_args()
    cases = [case for case in vgdf_scores.cases_of(args) if case.shift == "kinematic"]
    configs = {case.method: load_config([], vgdf_scores.overrides(case, args)).method for case in cases}
    m = configs["vgdf"]
    assert (m.source_steps(m.num_updates), m.target_steps(m.num_updates)) == (100_000, 10_000)
    assert (m.start_gate, m.dynamics.patience_decay, m.dynamics.refit_every) == (10_000, 15_000, 250)
    assert m.filter == "proximity"
    assert configs["mix"].filter == "none"
    assert configs["mix"].num_updates == m.num_updates


def test_runs_of_an_earlier_call_are_taken_from_its_lines_and_only_with_the_same_settings(tmp_path):
    words = ["--shifts", "kinematic", "--methods", "zero-shot", "finetune", "mix", "--seeds", "2"]
    args = vgdf_args(*words)
    target, summary = "offsweep/Hopper-kinematic-v5", {"outcome": "finished", "wall_s": 5.0}
    lines = [
        vgdf_scores.line_of(vgdf_scores.Run(target, method, seed, [(9, 1, 10.0 * seed)], summary), args, "x")
        for method, seeds in (("zero-shot", (0, 1)), ("finetune", (0, 1)), ("mix", (0,))) for seed in seeds
    ]  # fmt: skip
    file = tmp_path / "lines.jsonl"
    means = list(vgdf_scores.mean_lines(vgdf_scores.scores_of(lines, target, 2), target, args, "x"))
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *means]))
    found = vgdf_scores.earlier_lines(vgdf_args(*words, "--earlier", str(file)))
    assert {case.method: of_case for case, of_case in found.items()} == {"finetune": lines[:4]}  # a seed of mix lacks
    assert vgdf_scores.scores_of(lines, target, 2) == {
        (target, "zero-shot"): [0.0, 10.0], (target, "finetune"): [0.0, 10.0],
    }  # fmt: skip
    assert not vgdf_scores.earlier_lines(vgdf_args(*words, "--earlier", str(file), "--episodes", "3"))
    with pytest.raises(UserError, match="cannot read"):
        vgdf_scores.earlier_lines(vgdf_args(*words, "--earlier", str(tmp_path / "none.jsonl")))


def test_claims_are_counted_over_the_targets():
    kinematic, morphology = (f"offsweep/Hopper-{shift}-v5" for shift in vgdf_scores.SHIFTS)
    scores = {
        (kinematic, "vgdf"): [10.0, 12.0], (morphology, "vgdf"): [10.0, 10.0],
        (kinematic, "finetune"): [11.5, 11.5], (morphology, "finetune"): [1.0, 2.0],
        (kinematic, "mix"): [13.0, 13.0], (morphology, "mix"): [3.0, 3.0],
    }  # fmt: skip
    densities = {kinematic: [-3.0, -5.0], morphology: [-1.0, -2.0]}
    args = vgdf_args()
    lines = {line["case"]: line for line in vgdf_scores.claim_lines(scores, densities, ["Hopper"], "v5", args, "x")}
    finetune = lines["claim/Finetune above VGDF"]
    assert (finetune["holds"], finetune["cases"], finetune["paper_holds"], finetune["paper_cases"]) == (1, 2, 2, 8)
    assert lines["claim/VGDF above Mix on morphology targets"]["holds"] == 1
    assert lines["claim/VGDF above Mix on kinematic targets"]["holds"] == 0
    assert lines["claim/fictitious values closer to the source's on morphology than on kinematic targets"]["holds"] == 1
    assert "claim/VGDF above Zero-shot" not in lines  # which was not trained


def test_a_search_is_held_against_the_setting_it_began_with_by_pairs_of_fresh_seeds():
    def confirmed(number, *values):
        return {"trial": number, "searched": 50.0, "mean": sum(values) / len(values), "values": list(values),
                "interval": None, "diverged": False}  # fmt: skip

    study = {
        "unit": "score", "dataset": "d", "label": "", "data": "", "counts": {"complete": 2},
        "confirmed": [confirmed(1, 12.0, 14.0, 19.0), confirmed(0, 10.0, 11.0, 12.0)], "best": {"value": 50.0},
        "trials": [{"number": i, "value": 40.0 + 10 * i, "params": {"method.eta": i}} for i in range(2)],
        "cost": {"wall_seconds": 9.0, "updates": 7, "updates_saved": 1, "online_episodes": 3},
        "confirm_cost": {"updates": 6}, "importances": {"method.eta": 0.9, "method.tau": 0.1},
    }  # fmt: skip
    lines = {line["case"]: line for line in study_hopper.lines(study, "x")}
    best, tuned = lines["confirmed/1"], lines["confirmed/0"]
    assert (best["value"], best["reference"], best["difference"]["mean"]) == (15.0, 11.0, 4.0)
    assert (tuned["difference"], tuned["hand_tuned"], best["hand_tuned"]) == (None, True, False)
    assert (lines["search"]["value"], lines["search"]["reference"]) == (50.0, 40.0)
    assert lines["importance/eta"]["ratio"] == pytest.approx(1.8)
    with pytest.raises(UserError, match="has not confirmed trial 0"):
        list(study_hopper.lines({**study, "confirmed": study["confirmed"][:1]}, "x"))
