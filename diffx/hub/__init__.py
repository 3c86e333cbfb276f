"""What others get: checkpoints that stock Diffusers loads, their cards, and how they are uploaded."""
