"""Models: a named, fingerprinted thing that maps frames to labels, embeddings, boxes or features.

    registry.py   an entry of a job file → ModelDef (facts, fingerprint; no torch) → Model
    base.py       what a person writes, and what stands around it: floors, geometry, checks
    located.py    a class and its files, found: what travels to the workers
    builtin/      models that need no weights, batched torch
    opencv.py     what OpenCV carries: cascades
    python.py     `package.module:Class`, the user's own model
    runner.py     several models over staged frames on one device

torch is imported where tensors are made, never on import: planning knows models by their facts.
"""
