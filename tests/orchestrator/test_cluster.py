from pathlib import Path

import numpy as np

from envs.dataset import COLUMNS
from orchestrator.cluster import RaySlots
from tests.orchestrator.studies import configured, dataset_of


def test_learners_in_ray_map_the_dataset_from_the_object_store(workdir: Path, ray_cluster: None):
    """Whatever the driver read it from, and without a file that a learner on another machine would miss."""
    import ray

    config = configured(workdir)
    dataset = dataset_of(config)
    slots = RaySlots(config.compute, dataset, 2, 0)
    try:
        looks = [actor.__ray_call__.remote(lambda process: process.dataset) for actor in slots._actors]
        for theirs in ray.get(looks):
            assert (theirs.name, theirs.content_hash) == (dataset.name, dataset.content_hash)
            for column in COLUMNS:
                np.testing.assert_array_equal(getattr(theirs, column), getattr(dataset, column))
        flags = [
            actor.__ray_call__.remote(
                lambda process: (
                    process.dataset.observations.flags.owndata,
                    process.dataset.observations.flags.writeable,
                )
            )
            for actor in slots._actors
        ]
        assert ray.get(flags) == [(False, False), (False, False)]  # neither has a copy of its own
    finally:
        slots.close()
