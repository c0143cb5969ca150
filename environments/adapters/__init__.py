"""Tasks that others wrote: reasoning-gym, files of rows, verifiers."""
