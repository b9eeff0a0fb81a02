"""Saving an offloaded model: as the ordinary checkpoint of its weights, or as the quantised files that it came from.

saver        save_pretrained(): dense weights by transformers, experts a row at a time
original     save_pretrained(packed=True): the tensors of the files, as they came
state_dict   state_dict() with the real experts
unquantised  what transformers would save as quantised, although its weights were unpacked
"""
