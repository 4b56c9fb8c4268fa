"""Commands of `diffalign data` that look at pairs, or write them anew."""
