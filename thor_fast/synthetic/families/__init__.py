"""One file per family of problems; each has ``problem(rng) -> Problem``."""
