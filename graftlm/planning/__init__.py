"""What a recipe needs and how fast it runs, before it runs."""
