"""GenEval (Ghosh et al., arXiv 2310.11513): does an image show the objects, counts, colours and positions asked for?"""
