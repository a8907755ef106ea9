// All ops as one unit: of a few lines each, they would spend most of a
// compiler's time on the headers of torch's tensors, every one of them anew.
// Names in anonymous namespaces are therefore of all of them.
#include "ops/allocate_sample_bits.cpp"
#include "ops/channel_stats.cpp"
#include "ops/dropout.cpp"
#include "ops/frozen_norm.cpp"
#include "ops/max_pool.cpp"
#include "ops/memory.cpp"
#include "ops/norm_act.cpp"
#include "ops/norm_grad.cpp"
#include "ops/quantize.cpp"
#include "ops/rectified.cpp"
#include "ops/relu_codes.cpp"
#include "ops/relu_mask.cpp"
#include "ops/sample_range_energy.cpp"
