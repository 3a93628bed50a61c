"""`python -m orchestrator` is the `offsweep` command."""

from orchestrator.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
