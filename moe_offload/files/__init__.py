"""Files read as hostile input, and written whole or not at all.

Imports neither torch nor another room. What is wrong with a file is a ValueError or an OSError here: only the caller
knows what the file is for, and makes a typed error of it that says what to do (`untrusted.refuse_file`,
`whole_file.save_whole`).
"""
