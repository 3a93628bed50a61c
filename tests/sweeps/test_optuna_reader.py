"""Optuna's own tools, such as its dashboard, read a study's journal."""

from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from sweeps.spec import StudySpec
from sweeps.study import JOURNAL_FILE, Study

SPACE = {
    "method.eta": {"type": "float", "low": 0.1, "high": 10.0, "log": True},
    "method.kind": {"type": "categorical", "choices": ["a", None]},
}


def test_optuna_reads_the_journal_beside_the_driver_and_leaves_it_as_it_is(tmp_path: Path):
    path = tmp_path / JOURNAL_FILE
    with Study.create(tmp_path, StudySpec("read", SPACE, num_trials=3, total_steps=4)) as study:
        reader = optuna.load_study(study_name="read", storage=JournalStorage(JournalFileBackend(str(path))))
        for number in range(3):
            assert study.ask() is not None
            study.report(number, 2, float(number))
            written = path.read_bytes()
            assert [trial.state.name for trial in reader.get_trials()] == ["COMPLETE"] * number + ["RUNNING"]
            assert reader.get_trials()[number].intermediate_values == {2: float(number)}
            assert path.read_bytes() == written
            study.set_attr(number, "seeds", [0])
            study.tell(number, float(number))
        records = study.trials()
    found = reader.get_trials()
    assert [trial.params for trial in found] == [record.params for record in records]
    assert [trial.value for trial in found] == [0.0, 1.0, 2.0]
    assert found[1].user_attrs == {"seeds": [0]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["driver.lock", JOURNAL_FILE, "study.yaml"]
