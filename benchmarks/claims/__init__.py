"""What TiKMiX is worth beside what people use; `python benchmarks/claims --help`."""
