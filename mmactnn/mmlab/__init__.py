"""MMEngine: registered names, the runner hook and the tools."""
