// Plan of a chain, which ops receive as a list of numbers.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "../ops/allocate.h"
#include "../ops/tensor_checks.h"

namespace mmactnn {

// Operations behind a convolution, by their numbers in the plan.
enum class Epilogue : int64_t {
  kNone = 0,
  kReLU = 1,      // kept as zeroed codes
  kNorm = 2,      // kept as plain codes
  kNormReLU = 3,  // kept as split codes, after an addition as plain and zeroed
};

constexpr int64_t kMaxDims = 3;

// Tensor that a step reads: the output of an earlier step, by its index, or an
// input of the chain, by the complement of its index.
class Source {
 public:
  explicit Source(int64_t reference) : reference_(reference) {}

  bool is_input() const { return reference_ < 0; }
  size_t index() const {
    return static_cast<size_t>(is_input() ? ~reference_ : reference_);
  }

 private:
  int64_t reference_;
};

// Reads the numbers of a list one by one.
template <typename Value>
class Reader {
 public:
  using Values = torch::headeronly::HeaderOnlyArrayRef<Value>;

  Reader(const char* name, const std::vector<Value>& list)
      : name_(name), left_(list) {}

  bool at_end() const { return left_.empty(); }

  Value next() { return *next(1).begin(); }

  // A view of the list.
  Values next(int64_t count) {
    STD_TORCH_CHECK(count >= 0 && static_cast<size_t>(count) <= left_.size(),
                    name_, " is shorter than what it describes");
    const Values values(left_.data(), static_cast<size_t>(count));
    left_ = Values(left_.data() + count, left_.size() - values.size());
    return values;
  }

 private:
  const char* name_;
  Values left_;
};

// A convolution and its epilogue.
struct Step {
  Source source;
  // Tensor that is added before the ReLU.
  std::optional<Source> added;
  // Index in the lists of parameters, buffers and settings.
  size_t layer;
  Sizes stride;
  Sizes padding;
  Sizes dilation;
  int64_t groups;
  Epilogue epilogue;
  bool use_batch_stats;
  int64_t bits;
  int64_t act_bits;
  int64_t group_size;
  // Number of times that other steps read its output.
  int64_t readers = 0;

  bool is_output() const { return readers == 0; }
  bool has_norm() const {
    return epilogue == Epilogue::kNorm || epilogue == Epilogue::kNormReLU;
  }
  // Number of tensors that the epilogue saves.
  size_t num_saved() const {
    if (epilogue == Epilogue::kNone) return 0;
    return has_norm() ? (added ? 5 : 3) : 2;
  }
};

// The steps, which point into `plan`.
class Plan {
 public:
  // For given numbers of inputs and layers.
  Plan(const std::vector<int64_t>& plan, size_t inputs, size_t layers)
      : inputs_(inputs), layers_(layers) {
    Reader<int64_t> reader("plan", plan);
    while (!reader.at_end()) steps_.push_back(read(reader));
    STD_TORCH_CHECK(!steps_.empty(), "plan must have a convolution");
  }

  const std::vector<Step>& steps() const { return steps_; }

 private:
  Step read(Reader<int64_t>& reader) {
    const Source source = read_source(reader);
    std::optional<Source> added;
    if (reader.next() != 0) added = read_source(reader);
    const int64_t layer = reader.next();
    STD_TORCH_CHECK(layer >= 0 && layer < static_cast<int64_t>(layers_),
                    "a step must be of one of ", layers_, " layers, got ",
                    layer);
    const int64_t dims = reader.next();
    STD_TORCH_CHECK(dims >= 1 && dims <= kMaxDims,
                    "a convolution must have 1 to 3 dimensions, got ", dims);
    const Sizes stride = reader.next(dims);
    const Sizes padding = reader.next(dims);
    const Sizes dilation = reader.next(dims);
    const int64_t groups = reader.next();
    const auto epilogue = static_cast<Epilogue>(reader.next());
    STD_TORCH_CHECK(!added || epilogue == Epilogue::kNormReLU,
                    "an addition must be followed by a ReLU");
    const bool use_batch_stats = reader.next() != 0;
    const int64_t bits = reader.next();
    const int64_t act_bits = reader.next();
    return {source, added,    static_cast<size_t>(layer),
            stride, padding,  dilation,
            groups, epilogue, use_batch_stats,
            bits,   act_bits, reader.next()};
  }

  Source read_source(Reader<int64_t>& reader) {
    const int64_t reference = reader.next();
    const Source source(reference);
    const size_t known = source.is_input() ? inputs_ : steps_.size();
    STD_TORCH_CHECK(source.index() < known,
                    "a step must read one of the inputs or a step before it, "
                    "got ",
                    reference, " for step ", steps_.size());
    if (!source.is_input()) ++steps_[source.index()].readers;
    return source;
  }

  const size_t inputs_;
  const size_t layers_;
  std::vector<Step> steps_;
};

// Sizes and strides of a tensor.
struct Layout {
  Sizes sizes;
  Sizes strides;
};

inline void append_layout(std::vector<int64_t>& layouts, const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  layouts.push_back(tensor.dim());
  layouts.insert(layouts.end(), sizes.begin(), sizes.end());
  layouts.insert(layouts.end(), strides.begin(), strides.end());
}

// The layouts, which point into the list.
inline std::vector<Layout> read_layouts(const std::vector<int64_t>& layouts) {
  Reader<int64_t> reader("layouts", layouts);
  std::vector<Layout> result;
  while (!reader.at_end()) {
    const int64_t dims = reader.next();
    const Sizes sizes = reader.next(dims);
    result.push_back({sizes, reader.next(dims)});
  }
  return result;
}

}  // namespace mmactnn
