"""Text to batches: rows -> messages -> ids and roles -> weights -> packs. Torch appears in `pack` only."""
