"""From a recipe to an adapter: the loop, its optimiser, the run around it and its report."""
