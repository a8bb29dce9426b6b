"""What a model does on rows that it was not trained on."""
