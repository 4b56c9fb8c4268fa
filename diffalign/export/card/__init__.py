"""The model card of tuned weights: what they are, what they gained, how they are used, whom to cite.

facts       what a run records of itself
evaluation  the table and the pictures of an evaluation of these weights
loading     the lines of Python that load them
text        the card, as Markdown with the Hub's metadata
write       where cards go, and which of them are never replaced
"""
