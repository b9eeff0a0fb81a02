"""Programs built on the front door: command line, generate, profile, bench, serving, simulate, report, the live view,
families.

May import anything; nothing outside imports it, so each folder can be deleted and the rest still works.
"""
