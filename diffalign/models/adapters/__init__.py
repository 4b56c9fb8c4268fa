"""What is tuned and how it is stored: LoRA, user attention, full weights, sums of them."""
