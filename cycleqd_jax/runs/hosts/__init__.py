"""Several processes as one run: how they join, divide episodes, and notice who is lost."""
