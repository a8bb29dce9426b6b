"""Online RL: answers of the model itself, rewards, and what a step trains on."""
