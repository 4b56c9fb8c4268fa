"""Commands of `diffalign data` that write pairs anew."""
