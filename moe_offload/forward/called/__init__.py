"""Experts that the model's own code calls or reads one by one, outside of any graph: what serves them.

    phantom.py    the placeholder that a module has in place of an expert's weight, and that nobody can read
    slots.py      the weights of the experts in slots, as parameters
    row.py        one expert's weight, which is read when it is used
    stack.py      a stack of experts, which gives rows for numbers and nothing else
    rows.py       the forms "stacks" and "lists", which are made of these
    counting.py   the same forms, counted where nothing is offloaded
    modules.py    the form "modules": an expert's own forward, on its slot
    hints.py      what a router says, before its experts are called
    table.py      a function a form

Recognised in `experts/`. Such a model is not compiled: which expert is called is decided by Python, step by step.
"""
