"""Judging images by eye: what is compared, votes, agreement of annotators, pairs from votes, the page's server."""
