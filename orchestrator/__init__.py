"""What runs where: command line, configuration, Ray actors, packs, checkpoints, artifacts and tracking.

Importing this package imports neither ray nor torch nor mlflow, so that
`orchestrator.environment.prepare_environment` can set their environment variables first.
"""
