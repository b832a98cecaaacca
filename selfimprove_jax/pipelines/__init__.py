"""One folder per system, each with `Config`, `stages(config)` and `report(run)`."""
