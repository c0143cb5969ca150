"""What the trimtab command and a notebook call."""
