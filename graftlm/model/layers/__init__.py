"""Where deltas sit: layers of the base, sites, hosts, and attaching deltas to them."""
