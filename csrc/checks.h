// Checks of tensors passed to the extension; messages begin with the tensor's name; ValueError in Python.
//
// The public functions of cumo_kernels check shapes and dtypes; these prevent out-of-bounds reads in a kernel.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#define NAME_OF(t) (&#t[#t[0] == '*'])  // an optional tensor is named like any other
#ifdef CUMO_EMULATE
#define CHECK_DEVICE(t) TORCH_CHECK_VALUE((t).is_cpu(), NAME_OF(t), " must be a CPU tensor in emulation, got ", (t).device())
#else
#define CHECK_DEVICE(t) TORCH_CHECK_VALUE((t).is_cuda(), NAME_OF(t), " must be a CUDA tensor, got ", (t).device())
#endif
#define CHECK_SAME_DEVICE(t, like) \
  TORCH_CHECK_VALUE((t).device() == (like).device(), NAME_OF(t), " must be on the device of ", NAME_OF(like), ", ", (like).device(), \
                    ", got ", (t).device())
#define CHECK_DTYPE(t, wanted) TORCH_CHECK_VALUE((t).scalar_type() == (wanted), NAME_OF(t), " must be ", wanted, ", got ", (t).scalar_type())
#define CHECK_SHAPE(t, ...)                                                                        \
  TORCH_CHECK_VALUE((t).sizes() == at::IntArrayRef(std::vector<int64_t>{__VA_ARGS__}), NAME_OF(t), " must be ", \
                    at::IntArrayRef(std::vector<int64_t>{__VA_ARGS__}), ", got ", (t).sizes())
#define CHECK_DIM(t, n) TORCH_CHECK_VALUE((t).dim() == (n), NAME_OF(t), " must have ", n, " dimensions, got ", (t).sizes())
// An index tensor: int32, contiguous, on the device of `like`.
#define CHECK_INDEX(t, like, ...)                                                               \
  do {                                                                                          \
    CHECK_SAME_DEVICE(t, like);                                                                 \
    CHECK_DTYPE(t, at::kInt);                                                                   \
    CHECK_SHAPE(t, __VA_ARGS__);                                                                \
    TORCH_CHECK_VALUE((t).is_contiguous(), NAME_OF(t), " must be contiguous, got strides ", (t).strides()); \
  } while (false)
