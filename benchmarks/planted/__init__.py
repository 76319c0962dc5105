"""The planted facts of `tiny-vl`: questions, methods that localise, and how well they do."""
