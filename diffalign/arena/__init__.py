"""The arena: every objective trained on the embedded world under one protocol, and the leaderboard of what it gained.

`entries` says who takes part, `jobs` trains and draws, `board` measures, `page` and `plots` show; `sweep` chooses the
hyper-parameters on other prompts than those that are reported. See docs/arena.md.
"""
