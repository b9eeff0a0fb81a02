"""stub"""
from __future__ import annotations
from dataclasses import dataclass
from typing import Any, Sequence
import torch
from torch import Tensor
Format = Any
LUT=[0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6]
def e8m0(s):
    s = s.view(torch.uint8)
    return torch.where(s==0, torch.tensor(0x0040,dtype=torch.int16), (s.to(torch.int16)<<7)).view(torch.bfloat16)
@dataclass(frozen=True)
class Mxfp4:
    def row_unit(self, shape): return 1
    def rows(self, t, b, e): return t[0][b:e], t[1][b:e]
    def find_fault(self, t): return "scale 255" if int(t[1].view(torch.uint8).max())==255 else None
    def unpack(self, t, out):
        q=t[0].view(torch.uint8); O=out.shape[0]; q=q.reshape(O,-1)
        lut=torch.tensor(LUT,dtype=torch.float32)
        v=torch.stack([lut[(q&15).long()],lut[(q>>4).long()]],-1).reshape(O,-1,32)
        out.copy_(torch.ldexp(v, t[1].view(torch.uint8).int()[...,None]-127).reshape(out.shape))
@dataclass(frozen=True)
class Fp8:
    def row_unit(self, shape): return shape[0] if False else 128
    def rows(self, t, b, e):
        q,s=t
        if s.dim()<2 or s.shape[0]==1: return q[b:e], s
        bl=self._bl(q,s); return q[b:e], s[b//bl:-(-e//bl)]
    def _bl(self,q,s): return q.shape[0]//s.shape[0]
    def find_fault(self,t): return None
    def unpack(self,t,out):
        q,s=t
        s=(s.float()-127).exp2() if s.dtype==torch.uint8 else s.float()
        so,si=s.shape if s.dim()==2 else (1,1)
        o,i=q.shape
        out.copy_((q.float().view(so,o//so,si,i//si)*s.reshape(so,1,si,1)).to(out.dtype).view(o,i))
@dataclass(frozen=True)
class Int4:
    def row_unit(self, shape): return 1
    def rows(self,t,b,e): return t[0][b:e],t[1][b:e]
    def find_fault(self,t): return None
    def unpack(self,t,out):
        p,s=t; sh=4*torch.arange(8,dtype=torch.int32)
        v=((p[...,None]>>sh)&15)-8
        o=p.shape[0]; v=v.reshape(o,-1).to(s.dtype).reshape(o,s.shape[1],-1)*s[...,None]
        out.copy_(v.reshape(out.shape))
