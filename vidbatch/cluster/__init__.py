"""The same pipeline on Ray actors: thin shells around the stage functions; the only `import ray`.

driver.py     RayEngine: hands out orders, watches, buries the dead, carries on
pools.py      joins or starts Ray, sizes and makes the actors
decoder.py    an actor that owns a task from its first byte to its commit
client.py     the decoder's way to the predictors: byte credits, what to do when one dies
predictor.py  an actor that holds the models and fills batches across clips and decoders
faults.py     a dead actor, told from an exception of ours
metrics.py    what Prometheus sees, by the names of metric_names.py
attribution.py  why decoders and predictors were idle, and what to change
telling.py    what the driver says of it while it runs; ending.py: how the run ended
jobs.py       the way in from outside: submits a job over HTTP and follows it

driver ── order ──▶ decoder ── chunk (object store) ──▶ predictor
       ◀─ report ──         ◀─── predictions ─────────
"""
