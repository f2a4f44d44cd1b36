"""One training run: epochs, updates, going on after an interruption, alarms."""
