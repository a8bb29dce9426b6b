"""Which adapters answer a request, or each of its tokens, where nobody names them."""
