"""Commands that convert, merge and give away weights."""
