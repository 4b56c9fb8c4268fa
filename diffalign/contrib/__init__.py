"""Methods that stand on the same interfaces as the core and that the core does not need.

The core finds them by name when a config or a file asks for them, and imports none of them.
"""
