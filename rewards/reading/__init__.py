"""Reading answers: final answers and blocks, plain texts, quantities, notation, and equivalence in processes."""
