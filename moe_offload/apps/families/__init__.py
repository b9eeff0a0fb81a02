"""Every MoE family of transformers as a tiny random model, and a way to drive any of them as a user would.

`tiny` builds the models, `session` runs them. Tests and the families command compare an offloaded run with a plain one,
family by family, without a checkpoint.
"""
