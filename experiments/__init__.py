"""What drives the scripts: the reproduction, the claims, analyses and their reports. Nothing imports it."""
