"""Tools that a policy calls: what a tool is, functions, interpreter, search."""
