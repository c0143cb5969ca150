"""Tasks of our own: the quickstart's three domains, and an order desk."""
