from pathlib import Path
from typing import Any

import numpy as np

from envs.dataset import COLUMNS, Dataset
from orchestrator.cluster import RaySlots
from tests.orchestrator.studies import configured, dataset_of


def test_learners_in_ray_map_the_dataset_from_the_object_store(workdir: Path, ray_cluster: None):
    """Whatever the driver read it from, and without a file that a learner on another machine would miss."""
    import ray

    config = configured(workdir)
    dataset = dataset_of(config)
    slots = RaySlots(config.compute, dataset, 2, 0)

    def look(process: Any, theirs: Dataset) -> tuple[Dataset, bool, bool]:
        flags = theirs.observations.flags
        return theirs, flags.owndata, flags.writeable

    try:
        looks = [actor.__ray_call__.remote(look, slots._dataset) for actor in slots._actors]
        for theirs, owned, writeable in ray.get(looks):
            assert (theirs.name, theirs.content_hash) == (dataset.name, dataset.content_hash)
            for column in COLUMNS:
                np.testing.assert_array_equal(getattr(theirs, column), getattr(dataset, column))
            assert not owned  # no learner has a copy of its own
            assert not writeable
    finally:
        slots.close()
