"""A folder of adapters with an index of what each one is, and adapters that move to another base."""
