"""Programs built on the front door: command line, bench, serving, simulate, report, families.

May import anything; nothing outside imports it, so each folder can be deleted and the rest still works.
"""
