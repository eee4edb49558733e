def tokenizer_files(*a): return {}
