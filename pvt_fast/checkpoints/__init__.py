"""Weights and models in files and on the hub.

`weights` loads and exports state dicts of any key map (`key_maps`) from any source, `fitting` them to a model;
`pretrained` saves and loads whole models, which `description` puts into words and `rebuild` makes again. Below them:
`files` reads archives of tensors, after `pickles` has looked through what they would execute; `hub` finds files,
`replacing` writes them.
"""
