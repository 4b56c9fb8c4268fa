"""Pairs written anew: without duplicates."""
