"""Each operation with all its names: torch functions, tensor methods, ATen overloads.

Operations in place are here as well: `passes.functional` lets readers find their results.
"""

from __future__ import annotations

import operator

import torch
from torch.nn import functional as F

from ..kernels.ops import STARKV

aten = torch.ops.aten

SDPA = (F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default)
FLEX = (torch.ops.higher_order.flex_attention,)
LINEAR = (F.linear, torch._C._nn.linear, aten.linear.default, aten.addmm.default, aten.mm.default)
MATMUL = (
    torch.matmul,
    operator.matmul,
    torch.bmm,
    "matmul",
    "bmm",
    "__matmul__",
    aten.matmul.default,
    aten.bmm.default,
)
EINSUM = (torch.einsum, aten.einsum.default)
BADDBMM = (torch.baddbmm, "baddbmm", aten.baddbmm.default)
SOFTMAX = (
    F.softmax,
    torch.softmax,
    "softmax",
    aten.softmax.int,
    aten._softmax.default,
    aten._safe_softmax.default,
)
DROPOUT = (
    F.dropout,
    torch.dropout,
    torch.dropout_,
    "dropout",
    aten.dropout.default,
    aten.dropout_.default,
)
NAN_TO_NUM = (
    torch.nan_to_num,
    "nan_to_num",
    "nan_to_num_",
    aten.nan_to_num.default,
    aten.nan_to_num_.default,
)
SIZE = ("size",)
ADD = (
    operator.add,
    operator.iadd,
    torch.add,
    "add",
    "add_",
    "__add__",
    "__iadd__",
    aten.add.Tensor,
    aten.add_.Tensor,
)
SUBTRACT = (
    operator.sub,
    operator.isub,
    torch.sub,
    torch.subtract,
    "sub",
    "sub_",
    "__sub__",
    "__isub__",
    aten.sub.Tensor,
    aten.sub_.Tensor,
)
REVERSE_SUBTRACT = (torch.rsub, aten.rsub.Scalar, aten.rsub.Tensor, "__rsub__")
MULTIPLY = (
    operator.mul,
    operator.imul,
    torch.mul,
    torch.multiply,
    "mul",
    "mul_",
    "multiply",
    "__mul__",
    "__imul__",
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.mul_.Tensor,
    aten.mul_.Scalar,
)
DIVIDE = (
    operator.truediv,
    operator.itruediv,
    torch.div,
    torch.divide,
    "div",
    "div_",
    "divide",
    "__truediv__",
    "__itruediv__",
    aten.div.Tensor,
    aten.div.Scalar,
    aten.div_.Tensor,
    aten.div_.Scalar,
)
EXP = (torch.exp, "exp", aten.exp.default)
SUM = (torch.sum, "sum", aten.sum.dim_IntList)
MASKED_FILL = (
    torch.masked_fill,
    "masked_fill",
    "masked_fill_",
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Scalar,
    aten.masked_fill_.Tensor,
)
INDEX_PUT = (
    torch.index_put,
    "index_put",
    "index_put_",
    aten.index_put.default,
    aten.index_put_.default,
)
SET_ITEM = (operator.setitem, "__setitem__")
OVERWRITE = ("copy_", aten.copy_.default, aten.copy.default)
IS_NAN = (torch.isnan, "isnan", aten.isnan.default)
EQUAL = (operator.eq, torch.eq, "eq", aten.eq.Scalar, aten.eq.Tensor)
SELECT_SCATTER = (torch.select_scatter, aten.select_scatter.default)
INDEX_COPY = (
    torch.index_copy,
    torch.scatter,
    "index_copy",
    "index_copy_",
    "scatter",
    "scatter_",
    aten.index_copy.default,
    aten.index_copy_.default,
    aten.scatter.src,
    aten.scatter_.src,
)
SLICE_SCATTER = (torch.slice_scatter, aten.slice_scatter.default)
WHERE = (torch.where, "where", aten.where.self, aten.where.ScalarOther)
SCALAR = (torch.tensor, torch.scalar_tensor, aten.scalar_tensor.default)
FULL = (
    *SCALAR,
    torch.full,
    torch.full_like,
    torch.zeros_like,
    aten.full.default,
    aten.full_like.default,
    aten.zeros_like.default,
)
CAST = (
    "to",
    "type",
    "type_as",
    "float",
    "half",
    "bfloat16",
    "double",
    aten.to.dtype,
    aten._to_copy.default,
    aten.to.dtype_layout,
)
COPY = (
    "contiguous",
    "clone",
    "detach",
    "detach_",
    torch.clone,
    torch.detach,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
)
TRANSPOSE = (torch.transpose, torch.swapaxes, "transpose", "swapaxes", aten.transpose.int)
PERMUTE = (torch.permute, "permute", aten.permute.default)
MOVE_DIM = (torch.movedim, torch.moveaxis, "movedim", "moveaxis", aten.movedim.int)
PAD = (F.pad, torch._C._nn.pad, aten.pad.default, aten.constant_pad_nd.default)
SLICE = (operator.getitem, aten.slice.Tensor)
EXPAND = (
    torch.Tensor.expand,
    torch.broadcast_to,
    "expand",
    "expand_as",
    "broadcast_to",
    aten.expand.default,
)
RESHAPE = (
    "reshape",
    "reshape_as",
    "view",
    "view_as",
    "flatten",
    "unflatten",
    "squeeze",
    torch.reshape,
    torch.flatten,
    torch.unflatten,
    torch.squeeze,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
)
TILE = (torch.tile, "repeat", "tile", aten.repeat.default)
STACK = (torch.stack, aten.stack.default)
UNBIND = (torch.unbind, "unbind", aten.unbind.int)
SELECT = (torch.select, "select", aten.select.int)
WIDEN = ("unsqueeze", torch.unsqueeze, aten.unsqueeze.default)
UNSQUEEZE = (*WIDEN, "__getitem__")
SPLIT = (
    torch.split,
    torch.chunk,
    "split",
    "chunk",
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
)
REPEAT = (torch.repeat_interleave, "repeat_interleave", aten.repeat_interleave.self_int)
TANH = (torch.tanh, "tanh", aten.tanh.default)
LOG_SUM_EXP = (torch.logsumexp, "logsumexp", aten.logsumexp.default, torch.logaddexp)
ACROSS_TOKENS = (
    torch.roll,
    "roll",
    aten.roll.default,
    torch.flip,
    "flip",
    aten.flip.default,
    torch.cumsum,
    "cumsum",
    aten.cumsum.default,
    torch.sort,
    "sort",
    aten.sort.default,
    F.conv1d,
    torch.conv1d,
    aten.conv1d.default,
    aten.convolution.default,
    F.avg_pool1d,
    torch.avg_pool1d,
    aten.avg_pool1d.default,
)
"""What may mix tokens or change their order, and keeps their number."""
CAT = (torch.cat, torch.concat, aten.cat.default)
MASKED_SCATTER = ("masked_scatter", torch.masked_scatter, aten.masked_scatter.default)
DEQUANTIZE = (STARKV.dequantize, STARKV.dequantize.default)
CACHE_WRITE = (STARKV.cache_write, STARKV.cache_write.default)
