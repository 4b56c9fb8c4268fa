"""What is tuned and how it is stored: tuning methods, LoRA, full weights, sums of them."""
