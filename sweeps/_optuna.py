"""The one place that sets up Optuna; the package's other modules take it from here.

Optuna reports every trial, and what it could do faster with further packages, on the error stream. The user
of a study has the first from the command line and can do without the second.
"""

import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)

__all__ = ["optuna"]
