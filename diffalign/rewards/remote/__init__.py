"""A scorer that runs in another process or on another machine, over HTTP."""
