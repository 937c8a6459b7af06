"""Every number that the project claims, one module each, runnable alone: `python -m bench.scheduler`."""
