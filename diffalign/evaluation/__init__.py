"""Images before and after, and what can honestly be said about the difference.

generate.generate        images of prompts x seeds, resumable
evaluate.evaluate        base against tuned models: scores, guards, grid, report
compare.compare          the same for existing images
scoring.score_folder     scores of a folder with a manifest
sampling.sample_images   images from a pipeline in memory, for validation while training
"""
