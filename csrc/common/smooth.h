// Smooth activations: value and derivatives of each, as functions of one
// number. All of them are listed in dispatch_smooth(), and in
// mmactnn/ops/smooth.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "codec.h"
#include "portability.h"

namespace mmactnn {

// An activation and its parameters, of which most have none.
struct Smooth {
  int function;
  float first;
  float second;
};

// Value and derivatives of a function.
struct Jet {
  float value;
  float derivative;
  float second;
  float third;
};

MMACTNN_HOST_DEVICE float logistic(float x) { return 1.0f / (1.0f + expf(-x)); }

// log(1 + exp(x)) without overflow.
MMACTNN_HOST_DEVICE float log_1p_exp(float x) {
  return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
}

// The hyperbolic tangent and its derivative, which is exact where the tangent
// is nearly 1.
struct TanhSlope {
  float value;
  float slope;

  explicit MMACTNN_HOST_DEVICE TanhSlope(float u) {
    const float e = expf(-2.0f * fabsf(u));
    const float share = 1.0f / (1.0f + e);
    value = copysignf((1.0f - e) * share, u);
    slope = 4.0f * e * share * share;
  }
};

// tanh(u(x)) and its derivatives, from u and its derivatives.
MMACTNN_HOST_DEVICE Jet outer_tanh(float u, float u1, float u2, float u3) {
  const TanhSlope tanh(u);
  const float t = tanh.value;
  return {t, tanh.slope * u1, tanh.slope * (u2 - 2.0f * t * u1 * u1),
          tanh.slope * (u3 - 6.0f * t * u1 * u2 -
                        2.0f * u1 * u1 * u1 * (1.0f - 3.0f * t * t))};
}

// x * f(x) and its derivatives, from those of f.
MMACTNN_HOST_DEVICE Jet times_input(float x, const Jet& f) {
  return {x * f.value, f.value + x * f.derivative,
          2.0f * f.derivative + x * f.second, 3.0f * f.second + x * f.third};
}

// The logistic function and its derivatives.
MMACTNN_HOST_DEVICE Jet logistic_jet(float x) {
  const float s = logistic(x), slope = s * (1.0f - s);
  return {s, slope, slope * (1.0f - 2.0f * s), slope * (1.0f - 6.0f * slope)};
}

struct Gelu {
  static MMACTNN_HOST_DEVICE float normal(float x) {
    return 0.398942280401432678f * expf(-0.5f * x * x);
  }
  static MMACTNN_HOST_DEVICE float cumulative(float x) {
    return 0.5f * (1.0f + erff(x * 0.707106781186547524f));
  }
  static MMACTNN_HOST_DEVICE float derivative(float x, const Smooth&) {
    return cumulative(x) + x * normal(x);
  }
  static MMACTNN_HOST_DEVICE Jet jet(float x, const Smooth&) {
    const float p = normal(x), c = cumulative(x), square = x * x;
    return {x * c, c + x * p, p * (2.0f - square), p * x * (square - 4.0f)};
  }
};

struct GeluTanh {
  static constexpr float kScale = 0.797884560802865356f;
  static constexpr float kCubic = 0.044715f;

  static MMACTNN_HOST_DEVICE float derivative(float x, const Smooth& f) {
    return jet(x, f).derivative;
  }
  static MMACTNN_HOST_DEVICE Jet jet(float x, const Smooth&) {
    if (is_nan(x)) return {x, x, x, x};
    // Derivatives of the hyperbolic tangent are 0 in float from here on.
    const float near = fminf(fmaxf(x, -16.0f), 16.0f);
    const float square = near * near;
    const Jet t =
        outer_tanh(kScale * near * (1.0f + kCubic * square),
                   kScale * (1.0f + 3.0f * kCubic * square),
                   6.0f * kScale * kCubic * near, 6.0f * kScale * kCubic);
    return times_input(x, {0.5f * (1.0f + t.value), 0.5f * t.derivative,
                           0.5f * t.second, 0.5f * t.third});
  }
};

struct Silu {
  static MMACTNN_HOST_DEVICE float derivative(float x, const Smooth&) {
    const float s = logistic(x);
    return s * (1.0f + x * (1.0f - s));
  }
  static MMACTNN_HOST_DEVICE Jet jet(float x, const Smooth&) {
    return times_input(x, logistic_jet(x));
  }
};

struct Mish {
  static MMACTNN_HOST_DEVICE float derivative(float x, const Smooth& f) {
    return jet(x, f).derivative;
  }
  static MMACTNN_HOST_DEVICE Jet jet(float x, const Smooth&) {
    const Jet s = logistic_jet(x);
    return times_input(
        x, outer_tanh(log_1p_exp(x), s.value, s.derivative, s.second));
  }
};

struct Hardswish {
  static MMACTNN_HOST_DEVICE float derivative(float x, const Smooth&) {
    if (is_nan(x)) return x;
    return x <= -3.0f ? 0.0f : x < 3.0f ? x / 3.0f + 0.5f : 1.0f;
  }
  static MMACTNN_HOST_DEVICE Jet jet(float x, const Smooth& f) {
    const bool inside = x > -3.0f && x < 3.0f;
    const float gate = fminf(fmaxf(x + 3.0f, 0.0f), 6.0f) / 6.0f;
    return {is_nan(x) ? x : x * gate, derivative(x, f),
            inside ? 1.0f / 3.0f : 0.0f, 0.0f};
  }
};

// `first`: factor of the exponential.
struct Elu {
  static MMACTNN_HOST_DEVICE float derivative(float x, const Smooth& f) {
    if (is_nan(x)) return x;
    return x <= 0.0f ? f.first * expf(x) : 1.0f;
  }
  static MMACTNN_HOST_DEVICE Jet jet(float x, const Smooth& f) {
    if (x > 0.0f) return {x, 1.0f, 0.0f, 0.0f};
    const float slope = f.first * expf(x);
    return {f.first * expm1f(x), slope, slope, slope};
  }
};

struct Sigmoid {
  static MMACTNN_HOST_DEVICE float derivative(float x, const Smooth&) {
    const float s = logistic(x);
    return s * (1.0f - s);
  }
  static MMACTNN_HOST_DEVICE Jet jet(float x, const Smooth&) {
    return logistic_jet(x);
  }
};

struct Tanh {
  static MMACTNN_HOST_DEVICE float derivative(float x, const Smooth&) {
    return TanhSlope(x).slope;
  }
  static MMACTNN_HOST_DEVICE Jet jet(float x, const Smooth&) {
    return outer_tanh(x, 1.0f, 0.0f, 0.0f);
  }
};

// `first`: factor of the input; above `second`, the identity.
struct Softplus {
  static MMACTNN_HOST_DEVICE float derivative(float x, const Smooth& f) {
    const float z = x * f.first;
    return z > f.second ? 1.0f : logistic(z);
  }
  static MMACTNN_HOST_DEVICE Jet jet(float x, const Smooth& f) {
    const float z = x * f.first;
    if (z > f.second) return {x, 1.0f, 0.0f, 0.0f};
    const float s = logistic(z), slope = s * (1.0f - s) * f.first;
    return {log_1p_exp(z) / f.first, s, slope,
            slope * (1.0f - 2.0f * s) * f.first};
  }
};

struct Hardsigmoid {
  static MMACTNN_HOST_DEVICE float derivative(float x, const Smooth&) {
    return x > -3.0f && x < 3.0f ? 1.0f / 6.0f : 0.0f;
  }
  static MMACTNN_HOST_DEVICE Jet jet(float x, const Smooth& f) {
    const float value = fminf(fmaxf(x + 3.0f, 0.0f), 6.0f) / 6.0f;
    return {is_nan(x) ? x : value, derivative(x, f), 0.0f, 0.0f};
  }
};

// Between `first` and `second`, both included.
struct Clamp {
  static MMACTNN_HOST_DEVICE float derivative(float x, const Smooth& f) {
    return x >= f.first && x <= f.second ? 1.0f : 0.0f;
  }
  static MMACTNN_HOST_DEVICE Jet jet(float x, const Smooth& f) {
    const float value = fminf(fmaxf(x, f.first), f.second);
    return {is_nan(x) ? x : value, derivative(x, f), 0.0f, 0.0f};
  }
};

constexpr int kSmoothFunctions = 11;

// Calls `body` with an object of the class of a function.
template <typename Body>
MMACTNN_HOST_DEVICE void dispatch_smooth(int function, const Body& body) {
  switch (function) {
    case 0:
      return body(Gelu{});
    case 1:
      return body(GeluTanh{});
    case 2:
      return body(Silu{});
    case 3:
      return body(Mish{});
    case 4:
      return body(Hardswish{});
    case 5:
      return body(Elu{});
    case 6:
      return body(Sigmoid{});
    case 7:
      return body(Tanh{});
    case 8:
      return body(Softplus{});
    case 9:
      return body(Hardsigmoid{});
    default:
      return body(Clamp{});
  }
}

// Codes of a derivative, whose range is that of the function: there are no
// ranges to keep. Code c stands for low + c * step. Behind the codes of all
// blocks, of `bits` bytes each, a byte for every kFlagBlocks of them tells
// whether one of their derivatives is not a finite number.
struct DerivativeCodes {
  float low;
  float step;
  int bits;
  int fraction;  // of encode_sum()
  bool dithered;

  MMACTNN_HOST_DEVICE uint32_t max_code() const { return max_code_of(bits); }

  MMACTNN_HOST_DEVICE uint32_t encode(float derivative, float scale,
                                      uint32_t random16) const {
    const uint32_t sum =
        encode_sum(derivative, low, scale, rounding_of(random16, fraction));
    const uint32_t largest = largest_sum(max_code());
    // A sum below that of code 0 is that of a value below `low`, by rounding.
    const uint32_t least = sum > kIntegerFloat ? sum : kIntegerFloat;
    return ((least < largest ? least : largest) - kIntegerFloat) >> fraction;
  }
};

constexpr int kFlagBlocks = 32;

MMACTNN_HOST_DEVICE int64_t flags_of(int64_t blocks) {
  return (blocks + kFlagBlocks - 1) / kFlagBlocks;
}

// Half of the variance of the decoded values of a group: the factor of a second
// derivative in an expectation.
MMACTNN_HOST_DEVICE float half_variance(Range range, bool dithered) {
  const float square = multiply(range.step, range.step);
  return multiply(square, dithered ? 1.0f / 24.0f : 1.0f / 12.0f);
}

// A function of a decoded value, less what its noise adds to the expectation,
// by the second derivative.
MMACTNN_HOST_DEVICE float corrected(float value, float half_variance,
                                    float second) {
  // Derivatives at an infinite value are NaN; there is no noise then.
  return half_variance == 0.0f ? value : value - half_variance * second;
}

}  // namespace mmactnn
