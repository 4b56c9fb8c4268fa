"""The page of a run, or of several side by side: curves, images, health reports, settings, cost."""
