"""Pages of one HTML file each: comparisons, strengths of LoRAs, doubtful pairs. No page needs a network."""
