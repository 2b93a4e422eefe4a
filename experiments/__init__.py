"""The runnable side of jopt: models, data, one training loop, the main job, benchmarks.

Reading order: `data`, `models`, `train` (the loop), `variants` (what is compared),
`compress` (the main job), `plots` and `html_report` (what a person sees).
"""
