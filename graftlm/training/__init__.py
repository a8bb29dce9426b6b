"""From a recipe to an adapter: the loop, its optimizer, the run around it and its report."""
