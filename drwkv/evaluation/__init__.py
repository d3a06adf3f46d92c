"""Features of images, metrics on features, and the report that shows them."""
