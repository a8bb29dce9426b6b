"""What a run shows: in a terminal, and as pages of one file each."""
