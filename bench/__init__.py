"""Measurements. Each writes a JSON file under `results/`, from which tables and plots are made."""
