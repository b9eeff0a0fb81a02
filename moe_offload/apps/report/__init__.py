"""What a run was like, on one page: `moe-offload run --save-report RUN.json`, then `moe-offload report RUN.json`.

`run_record` is what is kept of a run, `collect` takes it from a model that ran, `advice` puts it into words, `charts`
draws it, `page` makes one HTML file of it all.
"""
