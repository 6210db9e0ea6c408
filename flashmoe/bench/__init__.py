"""One layer timed on a GPU, beside what the memory gives and beside other implementations: `flashmoe bench`."""
