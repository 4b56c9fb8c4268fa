"""Commands that generate images, or score and compare existing ones."""
