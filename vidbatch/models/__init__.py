"""Models: a named, fingerprinted thing that maps frames to labels, embeddings, boxes or features.

    registry.py   an entry of a job file → ModelDef (facts, fingerprint; no torch) → Model
    entries.py    what stands in such an entry, checked value by value
    base.py       what a person writes, and what stands around it: floors, geometry
    answers.py    arithmetic on Predictions: floors, cutting, joining, checks
    masks.py      class maps → areas and run lengths
    located.py    a class and its files, found: what travels to the workers
    weights.py    files that are too large to travel: hashed, staged once per node
    builtin/      models that need no weights, batched torch
    huggingface/  models of the transformers library
    opencv.py     what OpenCV carries: cascades
    python.py     `package.module:Class`, the user's own model
    staging.py    pieces of chunks → buffers on the device
    crops.py      boxes of one model cut out for another
    runner.py     several models over staged items on one device

torch is imported where tensors are made, never on import: planning knows models by their facts.
"""
