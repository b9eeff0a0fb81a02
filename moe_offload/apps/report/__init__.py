"""What a run was like, on one page: `moe-offload run --report RUN.json`, `moe-offload report RUN.json -o report.html`.

`record` is what is kept of a run, `collect` takes it from a running model, `advice` puts it into words, `charts` draws
it, `page` makes one HTML file of it all.
"""
