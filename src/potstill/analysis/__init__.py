"""Arrays in, numbers out: what a study's runs say, and how surely. No files, no plots."""
