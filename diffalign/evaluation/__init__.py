"""Pictures before and after, and what can honestly be said about the difference.

generate.generate        pictures of prompts x seeds, resumable
evaluate.evaluate        base against tuned models: scores, guards, grid, report
compare.compare          the same for pictures that exist
scoring.score_folder     scores of a folder with a manifest
sampling.sample_images   pictures from a pipeline in memory, for validation while training
"""
