"""A run's folder, clock, voice and seeds."""
