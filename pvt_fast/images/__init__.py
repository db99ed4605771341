"""From pixels to a model's input: `preprocess` for files, `pixels` for tensors."""
