"""Whether a server, ours or another, applies an adapter: at its scale, with its chat template."""
