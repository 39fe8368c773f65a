"""Takes orders over HTTP, and confirms or cancels them."""
