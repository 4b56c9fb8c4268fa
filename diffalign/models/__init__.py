"""Networks: loading base models, tuning them, the reference, and saving.

Nothing is imported here: diffusers, transformers and peft are imported by the modules that need them.
"""
