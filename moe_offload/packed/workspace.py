import torch
def borrow(shape,dtype): return torch.empty(shape,dtype=dtype)
