"""Messages -> ids, roles and loss weights, by the chat template of the tokenizer."""
